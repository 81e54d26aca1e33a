//! Parses and formats sizes.

/// Units from the largest on: 1024 to the power of 6 ... 1.
const UNITS: [(&str, u32); 6] = [("E", 60), ("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// A size in bytes from a number with an optional unit (`b`, `k`, `M`, `G`, `T`, `P`, `E`, in steps of 1024; `KiB` is
/// `k`); the number may have decimals: `1.5G`, `.5M`. A number of bytes may be hexadecimal: `0x1000`.
///
/// # Errors
/// A sentence that says how to write a size.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad =
        || format!("'{text}' is not a size: write bytes, or a number with a unit, such as 512M or 1.5G");
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // The parser would take a sign.
        let valid = digits.bytes().all(|b| b.is_ascii_hexdigit());
        return u64::from_str_radix(digits, 16).ok().filter(|_| valid).ok_or_else(bad);
    }
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_uppercase();
    let bits = match unit.strip_suffix("IB").filter(|unit| !unit.is_empty()).unwrap_or(&unit) {
        "" | "B" => 0,
        unit => UNITS.iter().find(|u| u.0 == unit).map(|u| u.1).ok_or_else(bad)?,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && part.is_empty()) || (bits == 0 && number.contains('.')) {
        return Err(bad());
    }
    let value: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
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

/// A size in the unit that leaves fewer than 1000 of it, rounded to three digits: `1.5 GiB`, `0.999 MiB`.
pub fn show_size(bytes: u64) -> String {
    // The unit of QEMU's tools: from 1000/1024 of it on.
    let unit = UNITS.iter().find(|u| u128::from(bytes) * 1024 / 1000 >= 1 << u.1);
    let Some((unit, bits)) = unit else { return format!("{bytes} B") };
    let decimals = [100, 10, 1].iter().position(|least| bytes >> bits >= *least).unwrap_or(3);
    let scale = 10_u128.pow(decimals as u32);
    let (scaled, half) = (u128::from(bytes) * scale, 1 << (bits - 1));
    let (floor, rest) = (scaled >> bits, scaled & ((1 << bits) - 1));
    // Ties to even, as printf does.
    let rounded = if rest > half || (rest == half && floor % 2 == 1) { floor + 1 } else { floor };
    let (whole, part) = (rounded / scale, rounded % scale);
    let number = if decimals == 0 { whole.to_string() } else { format!("{whole}.{part:0decimals$}") };
    let number = if decimals == 0 { &number } else { number.trim_end_matches('0').trim_end_matches('.') };
    format!("{number} {unit}iB")
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
            (".5M", 1 << 19),
            ("0x1000", 4096),
            ("0XfF", 255),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in [
            "",
            "k",
            "-1",
            "1x",
            "16E",
            "99999999999999999999",
            "1.x",
            "1 G",
            ".",
            ".k",
            "0.5",
            "1.5b",
            "0x",
            "0x+1",
            "0x1k",
            "0x10000000000000000",
            "1KiBiB",
            "1iB",
            "1KBB",
            "1.2.3k",
        ] {
            assert!(parse_size(bad).unwrap_err().contains("not a size"), "{bad}");
        }
    }

    #[test]
    fn sizes_are_rounded_to_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            ((64 << 20) + (1 << 19), "64.5 MiB"),
            (1_300_000_000, "1.21 GiB"),
            (123_457_024, "118 MiB"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1152, "1.12 KiB"),
            (1_047_552, "0.999 MiB"),
            (1_048_575, "1 MiB"),
            (10_695_680, "10.2 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(show_size(bytes), text);
        }
    }
}
