//! The version of TensorRT that graphs are checked for.

use std::fmt;
use std::str::FromStr;

use crate::error::ParseError;

/// The versions that the table of operators covers: major versions, each with its last minor version.
const KNOWN: [(u32, u32); 2] = [(10, 16), (11, 1)];

/// A version of TensorRT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorRtVersion {
    major: u32,
    minor: u32,
    rtx: bool,
}

impl Default for TensorRtVersion {
    /// The last version that ONNX Runtime's TensorRT provider supports.
    fn default() -> TensorRtVersion {
        TensorRtVersion { major: 10, minor: 16, rtx: false }
    }
}

impl FromStr for TensorRtVersion {
    type Err = ParseError;

    /// Reads `tensorrt`, `tensorrt=10.3` or `tensorrt=rtx`.
    fn from_str(text: &str) -> Result<TensorRtVersion, ParseError> {
        let expected = || {
            let known: Vec<String> = KNOWN.iter().map(|(major, last)| format!("{major}.0 to {major}.{last}")).collect();
            let expected = format!("tensorrt, tensorrt=VERSION of {} or tensorrt=rtx", known.join(", "));
            ParseError::expected(expected, text)
        };
        match text.strip_prefix("tensorrt").ok_or_else(expected)? {
            "" => Ok(TensorRtVersion::default()),
            // Its parser corresponds to TensorRT 10.15 or newer.
            "=rtx" => Ok(TensorRtVersion { major: 10, minor: 15, rtx: true }),
            version => {
                // Full versions such as 10.16.1.11 are accepted; patch and build do not matter.
                let numbers = version.strip_prefix('=').ok_or_else(expected)?.split('.').map(str::parse);
                let numbers = numbers.collect::<Result<Vec<u32>, _>>().map_err(|_| expected())?;
                let &[major, minor, ..] = &numbers[..] else { return Err(expected()) };
                let is_known = KNOWN.iter().any(|&(known, last)| known == major && minor <= last);
                if is_known { Ok(TensorRtVersion { major, minor, rtx: false }) } else { Err(expected()) }
            }
        }
    }
}

impl fmt::Display for TensorRtVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rtx {
            return f.write_str("TensorRT for RTX");
        }
        write!(f, "TensorRT {}.{}", self.major, self.minor)
    }
}

impl TensorRtVersion {
    /// Whether this version is `since` or later.
    pub(super) fn has(self, since: &str) -> bool {
        let mut numbers = since.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        (self.major, self.minor) >= (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        let version = |text: &str| text.parse::<TensorRtVersion>();
        assert_eq!(version("tensorrt"), Ok(TensorRtVersion::default()));
        assert_eq!(version("tensorrt=10.3").map(|version| version.to_string()), Ok("TensorRT 10.3".into()));
        assert!(version("tensorrt=11.1").is_ok_and(|version| version.has("10.15")));
        assert!(version("tensorrt=10.3").is_ok_and(|version| version.has("8.6") && !version.has("10.15")));
        assert_eq!(version("tensorrt=10.16.1.11"), Ok(TensorRtVersion::default()));
        for text in ["cuda", "tensorrt=", "tensorrt=ten", "tensorrt10", "tensorrt=10", "tensorrt=10.x", "tensorrt=RTX"]
        {
            assert!(version(text).is_err(), "{text}");
        }
        for text in
            ["tensorrt=8.6", "tensorrt=9.3", "tensorrt=10.17", "tensorrt=11.2", "tensorrt=12.1", "tensorrt=99.0"]
        {
            let error = version(text).expect_err(text).to_string();
            assert!(error.contains("10.0 to 10.16, 11.0 to 11.1") && error.ends_with(text), "{error}");
        }
    }
}
