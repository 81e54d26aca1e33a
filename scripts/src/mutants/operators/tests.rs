//! The slips one by one.

use super::*;
use crate::mutants::render::render;

/// The text with one slip in it, as if it were selected.
fn made(source: &str, operator: &str) -> Vec<String> {
    let all = slips(source).unwrap();
    all.into_iter()
        .filter(|s| s.operator == operator)
        .map(|s| render(source, &[(7, s.edit)]).text.replace("::tap_host::mutant::is(7)", "S"))
        .collect()
}

#[test]
fn each_kind_of_slip_is_found() {
    let one = |body: &str, operator: &str| {
        let all = made(&format!("async fn f(&self) {{ {body} }}"), operator);
        let inner = |t: &String| t["async fn f(&self) { ".len()..t.len() - 2].to_string();
        all.iter().map(inner).collect::<Vec<_>>()
    };
    assert_eq!(one("a.b().await;", "await lost"), ["if !S { a.b().await; }"]);
    assert_eq!(one("x.wake();", "wake lost"), ["if !S { x.wake(); }"]);
    assert_eq!(one("x = 1;", "assignment lost"), ["if !S { x = 1; }"]);
    assert_eq!(one("a(); b();", "order turned round"), ["if S { b(); a(); } else { a(); b(); }"]);
    assert_eq!(one("a(); b();", "early return"), ["a(); if S { return; } b();"]);
    assert_eq!(one("let _g = a();", "guard lost"), ["let _g = (if S { None } else { Some(a()) });"]);
    assert_eq!(one("a()?;", "error ignored"), ["if S { let _ = a(); } else { a()?; }"]);
    assert_eq!(one("if a < 1 { b() }", "bound off by one"), ["if (if S { a <= 1 } else { a < 1 }) { b() }"]);
    assert_eq!(one("if let A = a { b() }", "condition false"), ["if !S && let A = a { b() }"]);
    assert_eq!(one("g(a + 1);", "bound off by one"), ["g((if S { a } else { a + 1 }));"]);
    assert_eq!(one("g(a.min(b));", "bound lost"), ["g((if S { a } else { a.min(b) }));"]);
    assert_eq!(
        one("match a { A => b(), B => {} }", "arm lost"),
        ["match a { A => { if !S { b() } }, B => {} }"]
    );
    assert_eq!(
        one("a().await; let x = c.get();", "stale copy"),
        ["let stale_39 = if S { Some(c.get()) } else { None }; a().await; \
         let x = match stale_39 { Some(value) => value, None => c.get() };"]
    );
}

#[test]
fn slips_that_nothing_could_feel_are_left_out() {
    let count = |body: &str, operator: &str| made(&format!("fn f() {{ {body} }}"), operator).len();
    for apart in [
        "a -= e.count; b.push(e);",
        "b.copy(&c); a += p.len() as u64;",
        "a.expect(\"so\"); b();",
        "a.into_iter().for_each(Waker::wake); drop(b);",
        "a.set(1); b.wake();",
        "self.a.set(1); self.b.borrow_mut().push(2);",
        "self.a = A::B; self.b += 1;",
        "call.error = None; call.extents.clear();",
        "s.a[i as usize].push(x); s.b[self.i].n += 1;",
        "*place = Some(self.next); self.waiting.push_back((self.next, waker.clone()));",
        "self.n += c as u64; self.end = self.end.max(o + c as u64 * b);",
        "before.push(other.owner); found.add(start, end);",
    ] {
        assert_eq!(count(apart, "order turned round"), 0, "{apart}");
    }
    for together in [
        "a -= 1; b.push(a);",
        "a.n = 1; a.go();",
        "a += f(); b();",
        "a.wake(); b().await;",
        "self.waker.set(w); a.wake();",
        "self.a.set(1); self.b.set(self.a.get());",
        "self.a.set(1); self.b();",
        "self.a = 1; self.b = self.a + 1;",
        "self.a += 1; self.b = f();",
        "self.list = taken; self.list.clear();",
        "*place = Some(self.next); self.all.push_back(place.clone());",
        "self.a = Some(f()); self.b.push_back(1);",
        "list.push(a.n); a.add(1);",
        "list.push(n); a.add(&list);",
        "list.push(n); a.add(n)?;",
    ] {
        assert_eq!(count(together, "order turned round"), 1, "{together}");
    }
    assert_eq!((count("a(); return;", "early return"), count("a(); b();", "early return")), (0, 1));
    assert_eq!(count("if thread::panicking() {}", "condition false"), 0);
    assert_eq!(count("if a { h.mark(M); }", "condition true"), 0);
    assert_eq!(count("if a { console.progress(n, m); }", "condition true"), 0);
    assert_eq!(count("if a || b > 1 && h.bug(B) { c(); }", "bound off by one"), 0);
    assert_eq!(count("if a || b > 1 && !h.bug(B) { c(); }", "bound off by one"), 1);
    assert_eq!((count("let _g = a;", "guard lost"), count("let _g = a();", "guard lost")), (0, 1));
    assert_eq!(count("drop(line); next.wake();", "release lost"), 0);
    assert_eq!(count("drop(line); next.wake(); b();", "release lost"), 1);
    assert_eq!(count("let (a, b) = c(); d(); drop((a, b));", "release lost"), 0);
    assert_eq!(count("let b = c(); d(); drop((a, b));", "release lost"), 1);
    assert_eq!(count("if a && h.bug(B) { b(); }", "call lost"), 0);
    assert_eq!(count("if a && !h.bug(B) { b(); }", "call lost"), 1);
    assert_eq!(count("match a { A if h.bug(B) => b(), C => {} };", "arm lost"), 0);
    assert_eq!(count("let a = if b { \"x\" } else { \"y\" };", "condition true"), 0);
    assert_eq!(count("let a = if b { 1 } else { 2 };", "condition true"), 1);
    assert_eq!(count("list.push(a); let n = why.len();", "stale copy"), 0);
    assert_eq!(count("list.push(a); let n = list.len();", "stale copy"), 1);
    assert_eq!(count("a.go().await; let n = why.len();", "stale copy"), 1);
    assert_eq!(count("self.go(); let n = self.list.len();", "stale copy"), 1);
    assert_eq!(count("self.a.set(1); let n = self.b.borrow().len();", "stale copy"), 0);
    assert_eq!(count("self.a.set(1); let n = self.a.get();", "stale copy"), 1);
    assert_eq!(count("self.a.set(1); let n = f(self.b.get());", "stale copy"), 1);
    let copies = "let (d, n) = (Rc::downgrade(&self.disks), self.name.clone());";
    assert_eq!(count(&format!("self.all.borrow_mut().insert(a, b); {copies}"), "stale copy"), 0);
    assert_eq!(count(&format!("self.insert(a, b); {copies}"), "stale copy"), 1);
    assert_eq!(count("self.a.set(1); let n = (self.b.clone(), self.len());", "stale copy"), 1);
    assert_eq!(count("go(p); let n = h.now_ns();", "stale copy"), 0);
    assert_eq!(count("go(p).await; let n = h.now_ns();", "stale copy"), 1);
    assert_eq!(count("if a > 0 && b { h.mark(M); }", "condition lost"), 0);
    assert_eq!(count("if a { h.mark(M); } else { b(); }", "condition true"), 1);
    assert_eq!(count("if a { h.mark(M); b(); }", "condition true"), 1);
}

#[test]
fn a_return_of_what_is_given_back_anyway_is_no_slip() {
    let early = |source: &str| made(source, "early return").len();
    assert_eq!(early("fn f() -> bool { a(); false }"), 0);
    assert_eq!(early("fn f() -> bool { a(); true }"), 1);
    assert_eq!(
        early("fn f() -> bool { let x = { a(); false }; x }"),
        2,
        "before the block's end and the function's"
    );
    assert_eq!(early("fn f() -> Result<(), E> { a()?; Ok(()) }"), 0);
    assert_eq!(early("fn f() { let a = b(); assert!(a); assert_eq!(a, b); }"), 0);
    assert_eq!(early("fn f() { a(); assert!(a); b(); }"), 2);
    assert_eq!(early("fn f() { if x { a(); assert!(a); } b(); }"), 2, "of the function, not of a block");
}

#[test]
fn what_speaks_to_people_or_tests_is_left_alone() {
    let source = "fn f(h: H) { h.log(E); if h.bug(&X) { h.mark(M); } }
        impl Display for A { fn fmt(&self) { if a { b(); } } }
        const A: u32 = 1 + 1;
        #[cfg(test)] mod tests { fn f() { a(); } }
        #[test] fn g() { a(); }";
    let all: Vec<_> = slips(source).unwrap().into_iter().map(|s| (s.operator, s.was)).collect();
    // Whether an action is reached at all is still tested.
    assert!(all.iter().all(|(operator, _)| *operator == "early return"), "{all:?}");
    assert!(slips("fn f( {").is_err());
}

#[test]
fn places_are_bytes_also_behind_other_letters() {
    let source = "//! ──►\nfn f() { a.wake(); }";
    assert_eq!(made(source, "wake lost"), ["//! ──►\nfn f() { if !S { a.wake(); } }"]);
}
