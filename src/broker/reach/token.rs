//! Tokens (JWT, RFC 7519) instead of passwords: when they expire, and how the broker gets a renewed one.

use super::{
    address::{Address, Secret},
    nodes::Nodes,
};
use crate::broker::errors::{Meaning, Refusal, described};
use crate::report::HumanDuration;
use lapin::Connection;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::{Duration, SystemTime},
};
use tokio::{task::JoinHandle, time::sleep};

/// How often the file is checked. Tokens live for minutes and are renewed well before they expire.
const LOOK_EVERY: Duration = Duration::from_secs(3);

/// How long a changed file must then stay unchanged: the broker closes the connection if it gets half a token.
const UNCHANGED_FOR: Duration = Duration::from_millis(200);

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

#[derive(Clone, Copy)]
pub(in crate::broker) struct Credentials<'a> {
    pub(in crate::broker) user: &'a str,
    pub(in crate::broker) virtual_host: &'a str,
    /// The password, if it is a token.
    pub(in crate::broker) token: Option<Token>,
    /// The file that a new password may come from.
    pub(in crate::broker) file: Option<&'a Path>,
}

impl Credentials<'_> {
    /// RabbitMQ cuts texts at 255 bytes, perhaps before "expired": with an expired token, a 403 is about that.
    pub(in crate::broker) fn meaning_of(&self, refusal: &Refusal) -> Meaning {
        match refusal.meaning() {
            Meaning::NotPermitted if refusal.code == 403 && self.expired_for().is_some() => Meaning::TokenExpired,
            meaning => meaning,
        }
    }

    pub(in crate::broker) fn advice_on_login(&self) -> String {
        match (self.expired_for(), self.token) {
            (Some(ago), _) => format!("the token expired {} ago; {}", HumanDuration(ago), self.how_to_renew()),
            (None, Some(_)) => "check the token's audience, and who has signed it".to_owned(),
            (None, None) => "check the user and the password".to_owned(),
        }
    }

    pub(in crate::broker) const fn how_to_grant(&self) -> &'static str {
        match self.token {
            Some(_) => "the token needs a scope for it",
            None => "grant it with rabbitmqctl set_permissions",
        }
    }

    fn expired_for(&self) -> Option<Duration> {
        self.token.and_then(Token::expired_for)
    }

    pub(in crate::broker) fn how_to_renew(&self) -> String {
        match self.file {
            Some(file) => format!("check what renews {}", file.display()),
            None => "mount one that is renewed (--password-file)".to_owned(),
        }
    }
}

/// The login of an open connection. Its token is renewed until this is dropped.
pub(in crate::broker) struct Login {
    user: String,
    virtual_host: String,
    token: Arc<Mutex<Option<Token>>>,
    file: Option<PathBuf>,
    renewal: Option<JoinHandle<()>>,
}

impl Login {
    pub(in crate::broker) fn new(connection: &Arc<Connection>, address: &Address, nodes: &Nodes) -> Self {
        let token = Arc::new(Mutex::new(Token::parse(address.password.expose())));
        let file = nodes.file_with_password().map(|file| file.path().to_owned());
        let renewal = file.clone().filter(|_| !address.logs_in_by_certificate()).map(|file| {
            let renewal = Renewal {
                connection: Arc::downgrade(connection),
                address: address.clone(),
                nodes: nodes.clone(),
                file,
                token: Arc::clone(&token),
            };
            tokio::spawn(renewal.run())
        });
        Self { user: address.username.clone(), virtual_host: address.virtual_host.clone(), token, file, renewal }
    }

    pub(in crate::broker) fn credentials(&self) -> Credentials<'_> {
        let token = *self.token.lock().expect("nobody panics with it");
        Credentials { user: &self.user, virtual_host: &self.virtual_host, token, file: self.file.as_deref() }
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        if let Some(renewal) = &self.renewal {
            renewal.abort();
        }
    }
}

/// Watches the file while the connection is open, and sends each new token to the broker.
struct Renewal {
    connection: Weak<Connection>,
    address: Address,
    nodes: Nodes,
    file: PathBuf,
    token: Arc<Mutex<Option<Token>>>,
}

impl Renewal {
    async fn run(mut self) {
        let mut read = None;
        loop {
            sleep(LOOK_EVERY).await;
            let state = file_state(&self.file);
            if state.is_none() || state == read {
                continue;
            }
            sleep(UNCHANGED_FOR).await;
            let password = self.password();
            // A file that is being written, or can't be used for now, is checked again.
            let Some(password) = password.filter(|_| file_state(&self.file) == state) else {
                continue;
            };
            read = state;
            if password == self.address.password {
                continue;
            }
            let Some(token) = Token::parse(password.expose()) else {
                tracing::debug!("{} has another password, for the next connection", self.file.display());
                self.address.password = password;
                continue;
            };
            let Some(connection) = self.connection.upgrade() else {
                return;
            };
            let reason = "the token was renewed".into();
            if let Err(error) = connection.update_secret(password.expose().into(), reason).await {
                tracing::debug!("the token was not renewed: {}", described(&error));
                return;
            }
            tracing::debug!("the broker has the new token from {}", self.file.display());
            self.address.password = password;
            *self.token.lock().expect("nobody panics with it") = Some(token);
        }
    }

    fn password(&mut self) -> Option<Secret> {
        // Compared by the printed URL: it has neither password nor parameters.
        let node = self.address.to_string();
        let nodes = self.nodes.read_addresses().inspect_err(|failure| tracing::debug!("{failure}")).ok()?;
        nodes.into_iter().find(|other| other.to_string() == node).map(|node| node.password)
    }
}

/// Changes when the file is written or replaced. Follows symbolic links, which mounted Secrets are.
fn file_state(file: &Path) -> Option<(u64, u64, i64, i64)> {
    let file = fs::metadata(file).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
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
