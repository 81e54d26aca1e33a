//! Parses and formats sizes.

/// Units from the largest on: 1024 to the power of 6 ... 1.
const UNITS: [(&str, u32); 6] = [("E", 60), ("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// A size in bytes from a number with an optional unit (`b`, `k`, `M`, `G`, `T`, `P`, `E`, in steps of 1024); the
/// number may have decimals: `1.5G`.
///
/// # Errors
/// A sentence that says how to write a size.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad =
        || format!("'{text}' is not a size: write bytes, or a number with a unit, such as 512M or 1.5G");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let bits = match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "" | "B" => 0,
        unit => UNITS.iter().find(|u| u.0 == unit).map(|u| u.1).ok_or_else(bad)?,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let value: u64 = whole.parse().map_err(|_| bad())?;
    let bytes = value.checked_shl(bits).filter(|b| b >> bits == value).ok_or_else(bad)?;
    // Decimals to a millionth of the unit.
    let mut millionths = 0;
    for (i, digit) in part.bytes().enumerate() {
        let digit = char::from(digit).to_digit(10).ok_or_else(bad)?;
        millionths += if i < 6 { u128::from(digit) * 10_u128.pow(5 - i as u32) } else { 0 };
    }
    let more = ((millionths << bits) / 1_000_000) as u64;
    bytes.checked_add(more).ok_or_else(bad)
}

/// A size in its largest unit, with up to three digits: `1.5 GiB`.
pub fn show_size(bytes: u64) -> String {
    let Some((unit, bits)) = UNITS.iter().find(|u| bytes >> u.1 > 0) else { return format!("{bytes} B") };
    let hundredths = (u128::from(bytes) * 100) >> bits;
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    match (whole, rest) {
        (_, 0) | (100.., _) => format!("{whole} {unit}iB"),
        (10.., _) => format!("{whole}.{} {unit}iB", rest / 10),
        _ => format!("{whole}.{rest:02} {unit}iB").replace("0 ", " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            ("1234", 1234),
            ("64k", 65536),
            ("64K", 65536),
            ("1.5G", 3 << 29),
            ("2MiB", 2 << 20),
            ("7b", 7),
            ("15E", 15 << 60),
            ("0.5k", 512),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "k", "-1", "1x", "16E", "99999999999999999999", "1.x", "1 G"] {
            assert!(parse_size(bad).unwrap_err().contains("not a size"), "{bad}");
        }
    }

    #[test]
    fn sizes_are_shown_in_up_to_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            ((64 << 20) + (1 << 19), "64.5 MiB"),
            (1_300_000_000, "1.21 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }
}
