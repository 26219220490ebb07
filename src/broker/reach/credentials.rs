//! What a connection logs in with, and how the broker gets a renewed token.

use super::{
    address::{Address, Secret},
    nodes::Nodes,
    token::Token,
};
use crate::{
    broker::errors::{Meaning, Refusal, described},
    report::HumanDuration,
};
use lapin::Connection;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, Weak},
    time::Duration,
};
use tokio::{task::JoinHandle, time::sleep};

/// Tokens live for minutes and are renewed well before they expire.
const CHECK_FILE_EVERY: Duration = Duration::from_secs(3);

/// How long a changed file must stay unchanged: the broker closes the connection if it gets half a token.
const UNCHANGED_FOR: Duration = Duration::from_millis(200);

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

    pub(in crate::broker) fn how_to_renew(&self) -> String {
        match self.file {
            Some(file) => format!("check what renews {}", file.display()),
            None => "mount one that is renewed (--password-file)".to_owned(),
        }
    }

    fn expired_for(&self) -> Option<Duration> {
        self.token.and_then(Token::expired_for)
    }
}

/// The credentials of an open connection. Until this is dropped, the broker gets each new token from their file.
pub(in crate::broker) struct CredentialsInUse {
    user: String,
    virtual_host: String,
    token: Arc<Mutex<Option<Token>>>,
    file: Option<PathBuf>,
    renewal: Option<JoinHandle<()>>,
}

impl CredentialsInUse {
    pub(super) fn new(connection: &Arc<Connection>, address: &Address, nodes: &Nodes) -> Self {
        let token = Arc::new(Mutex::new(Token::parse(address.password.expose())));
        let file = nodes.file_with_password().map(|file| file.path().to_owned());
        let renewal = file.clone().filter(|_| !address.logs_in_by_certificate()).map(|file| {
            let renewal = Renewal {
                connection: Arc::downgrade(connection),
                address: address.clone(),
                nodes: nodes.clone(),
                file,
                last_read: None,
                token: Arc::clone(&token),
            };
            tokio::spawn(renewal.run())
        });
        Self { user: address.username.clone(), virtual_host: address.virtual_host.clone(), token, file, renewal }
    }

    pub(in crate::broker) fn now(&self) -> Credentials<'_> {
        let token = *self.token.lock().expect("nobody panics with it");
        Credentials { user: &self.user, virtual_host: &self.virtual_host, token, file: self.file.as_deref() }
    }
}

impl Drop for CredentialsInUse {
    fn drop(&mut self) {
        if let Some(renewal) = &self.renewal {
            renewal.abort();
        }
    }
}

struct Renewal {
    /// `Weak`, so that dropping the `OpenConnection` ends the connection.
    connection: Weak<Connection>,
    /// Its password is the one that was last sent to the broker, or last read.
    address: Address,
    nodes: Nodes,
    file: PathBuf,
    last_read: Option<FileVersion>,
    token: Arc<Mutex<Option<Token>>>,
}

impl Renewal {
    async fn run(mut self) {
        loop {
            let password = self.new_password().await;
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

    /// A file that is being written, or can't be used for now, is checked again.
    async fn new_password(&mut self) -> Secret {
        loop {
            sleep(CHECK_FILE_EVERY).await;
            let version = file_version(&self.file);
            if version.is_none() || version == self.last_read {
                continue;
            }
            sleep(UNCHANGED_FOR).await;
            if let Some(password) = self.read_password()
                && file_version(&self.file) == version
            {
                self.last_read = version;
                if password != self.address.password {
                    return password;
                }
            }
        }
    }

    fn read_password(&mut self) -> Option<Secret> {
        // Compared by the printed URL: it has neither password nor parameters.
        let node = self.address.to_string();
        let nodes = self.nodes.read_addresses().inspect_err(|failure| tracing::debug!("{failure}")).ok()?;
        nodes.into_iter().find(|other| other.to_string() == node).map(|node| node.password)
    }
}

/// Device, inode, and when it was changed: differs once the file is written or replaced.
type FileVersion = (u64, u64, i64, i64);

/// Follows symbolic links, which mounted Secrets are.
fn file_version(file: &Path) -> Option<FileVersion> {
    let file = fs::metadata(file).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}
