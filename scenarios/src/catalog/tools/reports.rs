//! Checks the tools' reports about an image against its bytes.

use super::Tool;
use super::disk::{Disk, Made};
use crate::check::Invariant;
use crate::formats;
use crate::program::named;
use crate::world::World;
use serde_json::Value;
use tap_host::SECTOR_BYTES;
use tap_images::ImageSpec;

/// Runs every tool on what was made.
pub(super) async fn check(world: &World, source: &Disk, made: &Made, epoch: u32) {
    brief(world, source, made).await;
    map(world, source, made).await;
    compare(world, made, epoch).await;
}

/// Runs the tools that read little.
pub(super) async fn brief(world: &World, source: &Disk, made: &Made) {
    info(world, source, made).await;
    check_command(world, &made.spec, made.view.len()).await;
}

/// Runs `check` on the source, which has compressed clusters unless it is raw.
pub(super) async fn of_source(world: &World, source: &Disk) {
    check_command(world, &source.spec, source.view.len()).await;
}

/// Runs a command that only reads. `None` if it failed, which errors permit, or was reported.
async fn ask(world: &World, words: &str, allowed: &[u8]) -> Option<Tool> {
    if world.verdict.is_broken() {
        return None;
    }
    let args: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    let tool = Tool::run(world, &args, None).await?;
    (allowed.contains(&tool.status) || tool.worked(world, &args)).then_some(tool)
}

fn wrong(world: &World, what: impl Into<String>) {
    world.fail(Invariant::I2, what);
}

/// The JSON that a tool has printed.
fn json(world: &World, tool: &Tool, words: &str) -> Option<Value> {
    let parsed = serde_json::from_str(&tool.out.join("\n"));
    parsed.map_err(|e| wrong(world, format!("tap-img {words} printed invalid JSON: {e}"))).ok()
}

fn expect(world: &World, words: &str, value: &Value, key: &str, expected: Value) {
    if value.get(key).unwrap_or(&Value::Null) != &expected {
        wrong(world, format!("tap-img {words}: {key} is {}, not {expected}", value[key]));
    }
}

async fn info(world: &World, source: &Disk, made: &Made) {
    let words = format!("info --output json {}", named(&made.spec));
    let Some(tool) = ask(world, &words, &[0]).await else { return };
    let Some(value) = json(world, &tool, &words) else { return };
    expect(world, &words, &value, "virtual-size", made.view.len().into());
    expect(world, &words, &value, "format", made.spec.format.name().into());
    let backing = if made.overlay { source.spec.path.as_str().into() } else { Value::Null };
    expect(world, &words, &value, "full-backing-filename", backing);
    if let Some(bytes) = made.cluster_bytes {
        expect(world, &words, &value, "cluster-size", bytes.into());
    }
}

async fn check_command(world: &World, spec: &ImageSpec, size: usize) {
    let words = format!("check --output json {}", named(spec));
    let Some(metadata) = formats::of(spec.format).metadata() else {
        let Some(tool) = ask(world, &words, &[63]).await else { return };
        if tool.status != 63 {
            wrong(world, format!("tap-img {words}: status {}, not 63", tool.status));
        }
        return;
    };
    // Without the clusters lost to failed or repeated writes, of which both must count the same number.
    let Some(tool) = ask(world, &words, &[0, 3]).await else { return };
    let Some(value) = json(world, &tool, &words) else { return };
    let content = formats::used_content(&world.storage, spec);
    let Ok(seen) = metadata.walk(&content) else { return };
    expect(world, &words, &value, "allocated-clusters", seen.mapped.into());
    expect(world, &words, &value, "total-clusters", size.div_ceil(1 << seen.cluster_bits).into());
    let lost = seen.leaked - seen.padding;
    expect(world, &words, &value, "leaks", if lost > 0 { lost.into() } else { Value::Null });
    if (tool.status == 3) != (lost > 0) {
        wrong(world, format!("tap-img {words}: status {} with {lost} lost clusters", tool.status));
    }
}

async fn map(world: &World, source: &Disk, made: &Made) {
    let words = format!("map --backing {} --output json {}", below(source, made), named(&made.spec));
    let Some(tool) = ask(world, &words, &[0]).await else { return };
    let Some(Value::Array(runs)) = json(world, &tool, &words) else { return };
    let mut end = 0;
    for run in &runs {
        let number = |key: &str| run[key].as_u64().unwrap_or(u64::MAX);
        let (start, length) = (number("start"), number("length"));
        if start != end || length == 0 || length > made.view.len() as u64 - end {
            return wrong(world, format!("tap-img {words}: a run of {length} bytes at {start}, after {end}"));
        }
        end += length;
        let shown = &made.view[start as usize..end as usize];
        if run["zero"] == true && shown.iter().any(|b| *b != 0) {
            return wrong(
                world,
                format!("tap-img {words}: {start}+{length} is reported as zeros but is not"),
            );
        }
        if run["data"] == true
            && let Some(offset) = run["offset"].as_u64()
        {
            let path = match number("depth") {
                0 => &made.spec.path,
                1 if made.overlay => &source.spec.path,
                _ => source.base.as_ref().map_or(&made.spec.path, |(path, _)| path),
            };
            let mut there = vec![0; shown.len()];
            let content = world.storage.content(path).unwrap_or_default();
            content.pages.read(offset, &mut there);
            if there != shown {
                let text =
                    format!("{start}+{length} is reported at {offset} of {path}, which holds other bytes");
                return wrong(world, format!("tap-img {words}: {text}"));
            }
        }
    }
    if end != made.view.len() as u64 {
        wrong(world, format!("tap-img {words}: it ends at {end} of {} bytes", made.view.len()));
    }
}

/// The `--backing` option for the files below what was made: of two, the lower one is named.
fn below(source: &Disk, made: &Made) -> String {
    match (made.overlay, &source.base) {
        (true, Some((path, _))) => format!("{} --backing raw:{path}", source.spec.format.name()),
        (true, None) => source.spec.format.name().to_owned(),
        (false, _) => "raw".to_owned(),
    }
}

/// Compares with a copy that differs in up to two sectors.
async fn compare(world: &World, made: &Made, epoch: u32) {
    let name = if epoch == 0 { "tool-differs-first" } else { "tool-differs-second" };
    let sectors = made.view.len() as u64 / SECTOR_BYTES;
    let differs = world.setting(
        name,
        &[[None; 2], [Some(0), None], [Some(sectors - 1), None], [Some(sectors / 3), Some(sectors / 2)]],
    );
    let mut other = made.view.clone();
    for sector in differs.into_iter().flatten() {
        let at = (sector * SECTOR_BYTES + 100) as usize;
        other[at] = made.view[at] ^ 1;
    }
    let other = Disk::raw(world, "/images/other", other);
    let words = format!("compare --backing {} {} {}", "probe", other.arg(), named(&made.spec));
    let Some(tool) = ask(world, &words, &[0, 1]).await else { return };
    let first = differs.into_iter().flatten().min();
    let expected = match first {
        Some(sector) => (1, format!("Content mismatch at offset {}!", sector * SECTOR_BYTES)),
        None => (0, "Images are identical.".to_owned()),
    };
    let said = tool.out.join("\n");
    if (tool.status, said.as_str()) != (expected.0, expected.1.as_str()) {
        wrong(world, format!("tap-img {words}: status {} and {said:?}, not {expected:?}", tool.status));
    }
    other.check_unchanged(world);
}
