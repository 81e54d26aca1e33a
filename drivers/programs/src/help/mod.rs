//! Help texts: files next to this one, with placeholders for the formats of the registry.

use tap_images::{Format, SHIPPED};

/// After the help of `tapdisk serve`.
pub(crate) fn serve() -> String {
    filled(include_str!("serve.txt"))
}

/// After the help of `tapdisk xen`.
pub(crate) fn xen() -> String {
    filled(include_str!("xen.txt"))
}

/// After the help of `tapdisk attach`.
pub(crate) fn attach() -> String {
    filled(include_str!("attach.txt"))
}

/// After the help of `tapdisk control`.
pub(crate) fn control() -> String {
    filled(include_str!("control.txt"))
}

/// After the help of `tap-ctl`.
pub(crate) fn ctl() -> String {
    filled(include_str!("ctl.txt"))
}

/// After the help of `tapback`.
pub(crate) fn tapback() -> String {
    filled(include_str!("tapback.txt"))
}

/// After the help of `tap-img`.
pub(crate) fn img() -> String {
    filled(include_str!("img.txt"))
}

/// After the help of `mason`.
pub(crate) fn mason() -> String {
    filled(include_str!("mason.txt"))
}

/// The text below the options of `tap-img commit`.
pub(crate) fn commit() -> String {
    filled(include_str!("commit.txt"))
}

/// The text below the options of `tap-img resize`.
pub(crate) fn resize() -> String {
    filled(include_str!("resize.txt"))
}

/// Fills in `{specs}`, the forms of image names, and `{formats}`, the formats with a description each.
fn filled(text: &str) -> String {
    let all = |show: fn(&Format) -> String| SHIPPED.iter().map(show).collect::<Vec<_>>().join(", ");
    let specs = all(|format| format!("{format}:PATH"));
    let formats = all(|format| format!("{format} ({})", format.info().about));
    text.trim_end().replace("{specs}", &specs).replace("{formats}", &formats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_texts_name_every_format_and_have_no_placeholder_left() {
        let [serve, xen, attach, img] = [serve(), xen(), attach(), img()];
        let [control, ctl, commit, tapback] = [control(), ctl(), commit(), tapback()];
        let [resize, mason] = [resize(), mason()];
        for format in SHIPPED {
            assert!([&serve, &attach, &ctl].iter().all(|text| text.contains(&format!("{format}:PATH"))));
            assert!(img.contains(&format!("{format} (")));
        }
        let left = ["{specs}", "{formats}"];
        let all = [serve, xen, attach, img, control, ctl, commit, tapback, resize, mason];
        assert!(all.iter().all(|text| !left.iter().any(|name| text.contains(name)) && !text.ends_with('\n')));
    }
}
