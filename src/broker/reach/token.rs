//! Passwords that are tokens (JWT, RFC 7519).

use std::time::{Duration, SystemTime};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::broker) struct Token {
    expires: Option<SystemTime>,
}

impl Token {
    /// `None` if it is an ordinary password.
    pub(in crate::broker) fn parse(password: &str) -> Option<Self> {
        let mut parts = password.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let object = |part| serde_json::from_slice::<serde_json::Map<_, _>>(&decode(part)?).ok();
        object(header)?;
        decode(signature)?;
        let expires = object(claims)?.get("exp").and_then(serde_json::Value::as_f64);
        let after = expires.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Some(Self { expires: after.and_then(|after| SystemTime::UNIX_EPOCH.checked_add(after)) })
    }

    pub(super) fn expired_for(self) -> Option<Duration> {
        SystemTime::now().duration_since(self.expires?).ok()
    }
}

/// Decodes base64url (RFC 4648, 5) without padding, the encoding of a JWT's parts.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let (mut buffer, mut bits) = (0_u32, 0);
    for character in text.bytes() {
        let value = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        };
        buffer = buffer << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((buffer >> bits) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 7519, 3.1
    const EXAMPLE: &str = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";

    #[test]
    fn a_token_says_when_it_expires() {
        let token = Token::parse(EXAMPLE).unwrap();
        assert_eq!(token.expires, Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_300_819_380)));
        assert!(token.expired_for().is_some());
        // {"alg":"none"}, and as claims {}, {"exp":2.5}, {"exp":-1}, {"exp":1e300}, {"exp":"1"}
        for (claims, expires) in [
            ("e30", None),
            ("eyJleHAiOjIuNX0", Some(Duration::from_millis(2500))),
            ("eyJleHAiOi0xfQ", None),
            ("eyJleHAiOjFlMzAwfQ", None),
            ("eyJleHAiOiIxIn0", None),
        ] {
            let token = Token::parse(&format!("eyJhbGciOiJub25lIn0.{claims}.")).unwrap();
            assert_eq!(token.expires, expires.map(|after| SystemTime::UNIX_EPOCH + after), "{claims}");
        }
    }

    #[test]
    fn an_ordinary_password_is_no_token() {
        let [header, claims, signature] = EXAMPLE.split('.').collect::<Vec<_>>()[..] else {
            panic!("three parts");
        };
        for password in [
            "",
            "guest",
            "..",
            "a.b.c",
            header,
            &format!("{header}.{claims}"),
            &format!("{header}.{claims}.{signature}."),
            &format!("{header}.{}.{signature}", &claims[1..]),
            &format!("{header}.{claims}\n.{signature}"),
            &format!("{EXAMPLE}\n"),
            // "[]" and "1"
            &format!("{header}.W10.{signature}"),
            &format!("MQ.{claims}.{signature}"),
        ] {
            assert_eq!(Token::parse(password), None, "{password:?}");
        }
    }
}
