//! The states of both ends of a device, each of which reacts to the other's; a decimal number in xenstore.

/// One end's state.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum XenbusState {
    /// Nothing is known; also what a missing node means.
    Unknown = 0,
    /// The toolstack made the device.
    Initialising = 1,
    /// The back end has published what it can do.
    InitWait = 2,
    /// The front end has published its ring.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// No new requests.
    Closing = 5,
    /// Everything released.
    Closed = 6,
    /// Being changed.
    Reconfiguring = 7,
    /// Changed.
    Reconfigured = 8,
}

impl XenbusState {
    /// All of them, by number.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Initialising,
        Self::InitWait,
        Self::Initialised,
        Self::Connected,
        Self::Closing,
        Self::Closed,
        Self::Reconfiguring,
        Self::Reconfigured,
    ];

    /// Its number, as used in events.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The state's value in xenstore.
    pub fn as_bytes(self) -> &'static [u8] {
        let digit = usize::from(self.number());
        &b"012345678"[digit..=digit]
    }

    /// The state that `value` in xenstore stands for: one decimal digit, possibly followed by the NUL that some front
    /// ends write. `None` for anything else.
    pub fn parse(value: &[u8]) -> Option<Self> {
        match value {
            [digit] | [digit, 0] => Self::ALL.get(usize::from(digit.wrapping_sub(b'0'))).copied(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_written_as_its_digit() {
        for (number, state) in XenbusState::ALL.into_iter().enumerate() {
            assert_eq!(usize::from(state.number()), number);
            assert_eq!(state.as_bytes(), number.to_string().as_bytes());
            assert_eq!(XenbusState::parse(state.as_bytes()), Some(state));
        }
    }

    #[test]
    fn other_values_are_no_state() {
        for bad in [&b""[..], b"9", b"-1", b" 4", b"4 ", b"04", b"44", b"/", b"four", &[0]] {
            assert_eq!(XenbusState::parse(bad), None, "{bad:?}");
        }
        assert_eq!(XenbusState::parse(b"4\0"), Some(XenbusState::Connected));
    }
}
