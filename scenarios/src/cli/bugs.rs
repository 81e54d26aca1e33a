//! `bugs` and `demo`: the testbed tests itself.

use super::args::{BugsArgs, Common};
use super::in_order::in_order;
use super::junit::{self, Case};
use super::output::{Progress, SHRINKS, load_run, revision, save_json, save_run, save_run_as, verdict};
use super::paths::after;
use super::replay::bug;
use super::{Exit, Stop};
use crate::hunt::{DECISIONS_MAX, Hunted, Quarry, check_saved, hunt};
use crate::probes::find_bug;
use crate::report::files::save_page;
use crate::run::Effort;
use crate::{catalog, interrupt, report};
use serde::Serialize;

/// Effort of shrinking one bug: the result must not depend on how busy the machine is.
const EFFORT: Effort = Effort::of_runs(SHRINKS.runs);

#[derive(Serialize)]
struct JsonBug {
    bug: String,
    found: bool,
    scenario: Option<&'static str>,
    invariant: Option<String>,
    seeds: u64,
    find_cpu_ns: u64,
    decisions_before: usize,
    decisions_after: usize,
    shrink_runs: u64,
    shrink_cpu_ns: u64,
}

/// `tapsim bugs`
pub(crate) fn bugs_command(common: &Common, args: &BugsArgs) -> Result<Exit, Stop> {
    if args.oracles {
        return super::oracles::oracles_command(common, args);
    }
    let mut quarries: Vec<Quarry> = if args.bugs.is_empty() { Quarry::all().collect() } else { Vec::new() };
    for name in &args.bugs {
        quarries.push(if name == "canary" { Quarry::Canary } else { Quarry::Bug(bug(name)?) });
    }
    if args.save && !args.saved.is_dir() {
        let shown = args.saved.display();
        return Err(Stop::usage(format!("folder {shown} does not exist: name another with --saved")));
    }
    if args.stale {
        quarries.retain(|quarry| !interrupt::asked() && is_stale(common, args, *quarry));
        if quarries.is_empty() && !interrupt::asked() {
            println!("nothing is stale: each saved run still shows its bug");
            return Ok(Exit::Ok);
        }
    }
    println!(
        "{:<24} {:<28} {:>4} {:>6} {:>10} {:>16} {:>7} {:>10}",
        "seeded bug", "found by", "rule", "seeds", "find ms", "decisions", "runs", "shrink ms"
    );
    let mut progress = Progress::new(Some(quarries.len() as u64));
    let mut missed = 0;
    let (mut json, mut cases) = (Vec::new(), Vec::new());
    let work = |quarry: &Quarry| {
        let near = load_run(&args.saved.join(saved_name(*quarry))).ok().map(|(_, spec)| spec.scenario);
        hunt(*quarry, near, args.within, common.guarded(), EFFORT)
    };
    let ended = in_order(common.threads(), &quarries, work, |quarry, hunted| {
        let good = hunted.as_ref().is_some_and(|h| h.outcome.decisions.len() <= DECISIONS_MAX);
        if interrupt::asked() && !good {
            // What was not found yet might have been.
            return Err(None);
        }
        missed += u64::from(!good);
        cases.push(case(*quarry, hunted.as_ref(), args.within, good));
        print_row(common, *quarry, hunted.as_ref(), args.within)?;
        if let (Some(h), true) = (&hunted, args.save && good) {
            save_run_as(&args.saved.join(saved_name(*quarry)), &h.spec, &h.outcome)?;
        }
        json.push(row(*quarry, hunted.as_ref(), args.within));
        progress.at(json.len() as u64, missed);
        Ok(())
    });
    progress.finish();
    let mut stored = match ended {
        Err(Some(stop)) => Err(stop),
        _ => Ok(()),
    };
    if let Some(path) = &common.json {
        stored = stored.and(save_json(path, &json));
    }
    stored = stored.and(junit::save(common.junit.as_deref(), "bugs", &cases));
    if json.len() < quarries.len() {
        println!("{} of {} were not hunted to the end", quarries.len() - json.len(), quarries.len());
    }
    println!("{} passed, {missed} failed", json.len() as u64 - missed);
    after(verdict(missed, Exit::Ok), stored)
}

/// A row of JUnit's XML.
fn case(quarry: Quarry, hunted: Option<&Hunted>, within: u64, good: bool) -> Case {
    let failure = hunted.map_or_else(
        || ("not found".to_owned(), format!("within {within} seeds of any scenario")),
        |h| ("not shrunk enough".to_owned(), format!("{} decisions are left", h.outcome.decisions.len())),
    );
    let cpu_ns = hunted.map_or(0, |h| h.find_cpu_ns + h.shrink_cpu_ns);
    Case { name: quarry.name(), cpu_ns, failure: (!good).then_some(failure) }
}

fn saved_name(quarry: Quarry) -> String {
    format!("{}.run", quarry.name())
}

/// Whether the saved run of `quarry` is missing or no longer shows it; prints the reason.
fn is_stale(common: &Common, args: &BugsArgs, quarry: Quarry) -> bool {
    let why = match load_run(&args.saved.join(saved_name(quarry))) {
        Err(Stop(_, why)) => why,
        Ok((_, spec)) if Quarry::of(&spec) != Some(quarry) => "the run is another bug's".into(),
        Ok((file, spec)) => match check_saved(&file, &spec, common.guarded()) {
            Ok(()) => return false,
            Err(why) => why.to_string(),
        },
    };
    println!("{}: {why}", quarry.name());
    true
}

fn print_row(common: &Common, quarry: Quarry, hunted: Option<&Hunted>, within: u64) -> Result<(), Stop> {
    let Some(h) = hunted else {
        println!("{:<24} not found within {within} seeds of any scenario", quarry.name());
        return Ok(());
    };
    save_run(common, &h.spec, &h.outcome)?;
    let rule = h.outcome.failure.as_ref().map_or(String::new(), |f| f.invariant.to_string());
    println!(
        "{:<24} {:<28} {:>4} {:>6} {:>10.1} {:>16} {:>7} {:>10.1}{}",
        quarry.name(),
        h.spec.scenario.name,
        rule,
        h.seeds,
        h.find_cpu_ns as f64 / 1e6,
        format!("{} -> {}", h.decisions_before, h.outcome.decisions.len()),
        h.shrink_runs,
        h.shrink_cpu_ns as f64 / 1e6,
        if h.outcome.decisions.len() > DECISIONS_MAX { "  too many decisions" } else { "" }
    );
    Ok(())
}

fn row(quarry: Quarry, hunted: Option<&Hunted>, within: u64) -> JsonBug {
    JsonBug {
        bug: quarry.name(),
        found: hunted.is_some(),
        scenario: hunted.map(|h| h.spec.scenario.name),
        invariant: hunted.and_then(|h| h.outcome.failure.as_ref()).map(|f| f.invariant.to_string()),
        seeds: hunted.map_or(within, |h| h.seeds),
        find_cpu_ns: hunted.map_or(0, |h| h.find_cpu_ns),
        decisions_before: hunted.map_or(0, |h| h.decisions_before),
        decisions_after: hunted.map_or(0, |h| h.outcome.decisions.len()),
        shrink_runs: hunted.map_or(0, |h| h.shrink_runs),
        shrink_cpu_ns: hunted.map_or(0, |h| h.shrink_cpu_ns),
    }
}

/// `tapsim demo`
pub(crate) fn demo_command(common: &Common) -> Result<Exit, Stop> {
    let bug = find_bug("data-after-mapping").expect("a bug of images");
    println!("1. A bug is switched on in an image driver: {}.", bug.sentence());
    println!("2. Seeds are tried in {} scenarios ...", catalog::ALL.len());
    let hunted = hunt(Quarry::Bug(bug), None, 2000, common.guarded(), EFFORT);
    let Some(h) = hunted else {
        if interrupt::asked() {
            return Ok(Exit::Interrupted);
        }
        return Err(Stop::harness("the seeded bug was not found, so the testbed is broken"));
    };
    println!(
        "   found by {} with seed {} after {} seeds and {:.0} ms of CPU.",
        h.spec.scenario.name,
        h.spec.seed,
        h.seeds,
        h.find_cpu_ns as f64 / 1e6
    );
    println!(
        "3. Shrunk from {} decisions to {} in {} runs and {:.0} ms of CPU. What is left:\n",
        h.decisions_before,
        h.outcome.decisions.len(),
        h.shrink_runs,
        h.shrink_cpu_ns as f64 / 1e6
    );
    print!("{}", report::story(&h.spec, &h.outcome));
    let path = save_run(common, &h.spec, &h.outcome)?;
    let page = save_page(&path, &h.spec, &h.outcome)
        .map_err(|e| Stop::usage(format!("failed to write the page of {}: {e}", path.display())))?;
    println!("\n4. Saved. Replay it with:  cargo tapsim replay {}", path.display());
    println!("   Look at it in a browser: {}", page.display());
    println!(
        "   (revision {}; without --bug the same seeds are clean: cargo tapsim sweep --seeds 0..2000)",
        revision()
    );
    Ok(Exit::Ok)
}
