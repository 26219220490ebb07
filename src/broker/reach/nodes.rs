//! The nodes of the broker and how to log in: from options, or from files that are read again for each new connection.

use super::{
    address::{Address, Secret, parse_list},
    file::{self, without_newline},
    tls::{Tls, TlsOptions},
};
use crate::exit::{Exit, Failure};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub struct SecretFile {
    path: PathBuf,
    /// The option or variable that names it, for errors.
    option: String,
    /// The content of a pipe, such as a shell's `<(…)`: it can be read only once.
    from_pipe: Option<Secret>,
}

impl SecretFile {
    pub const fn new(path: PathBuf, option: String) -> Self {
        Self { path, option, from_pipe: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    const fn may_change(&self) -> bool {
        self.from_pipe.is_none()
    }

    fn read(&mut self) -> Result<String, Failure> {
        if let Some(text) = &self.from_pipe {
            return Ok(text.expose().to_owned());
        }
        let is_pipe = !self.path.is_file();
        let text = file::read_text(&self.path)
            .map_err(|error| file::read_failure(&format!("{}: {}", self.option, self.path.display()), &error))?;
        self.from_pipe = is_pipe.then(|| text.clone().into());
        Ok(text)
    }

    fn unusable(&self, exit: Exit, problem: &str) -> Failure {
        Failure::new(exit, format!("{}: {} {problem}", self.option, self.path.display()))
    }

    fn addresses(&mut self) -> Result<Vec<Address>, Failure> {
        parse_list(&self.read()?).map_err(|error| Failure::usage(format!("{}: {error}", self.option)))
    }

    fn password(&mut self) -> Result<Secret, Failure> {
        let password = without_newline(&self.read()?).to_owned();
        if password.is_empty() {
            return Err(self.unusable(Exit::Config, "is empty"));
        }
        Ok(password.into())
    }

    /// The user and the password, in the format of rabbitmq-c's tools.
    fn user_and_password(&mut self) -> Result<(String, Secret), Failure> {
        let text = self.read()?;
        let mut lines = text.lines();
        let mut line = |prefix| lines.next().and_then(|line| line.strip_prefix(prefix));
        match (line("username:"), line("password:"), lines.next()) {
            (Some(username), Some(password), None) => Ok((username.to_owned(), password.to_owned().into())),
            _ => Err(self.unusable(Exit::Usage, "has to consist of two lines, username:USER and password:PASSWORD")),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Nodes {
    /// As last read.
    pub addresses: Vec<Address>,
    pub url_file: Option<SecretFile>,
    pub authfile: Option<SecretFile>,
    /// It takes precedence over any other password.
    pub password_file: Option<SecretFile>,
    pub tls_options: TlsOptions,
    pub tls: Tls,
}

impl Nodes {
    pub(super) fn may_change(&self) -> bool {
        let files = [&self.url_file, &self.authfile, &self.password_file];
        files.into_iter().flatten().any(SecretFile::may_change)
    }

    /// The file that a password may come from, if it can be read again.
    pub(super) fn file_with_password(&self) -> Option<&SecretFile> {
        let file = self.password_file.as_ref().or(self.authfile.as_ref()).or(self.url_file.as_ref());
        file.filter(|file| file.may_change())
    }

    /// # Errors
    /// 78 for a file that can't be used, 71 if the system is short of something, 64 for a wrong address or an authfile
    /// without its two lines. Then nothing changes.
    pub fn read(&mut self) -> Result<(), Failure> {
        let addresses = self.read_addresses()?;
        self.tls = Tls::load(&addresses)?;
        self.addresses = addresses;
        Ok(())
    }

    pub(super) fn read_addresses(&mut self) -> Result<Vec<Address>, Failure> {
        let mut addresses = match &mut self.url_file {
            Some(file) => file.addresses()?,
            None => self.addresses.clone(),
        };
        let user_and_password = self.authfile.as_mut().map(SecretFile::user_and_password).transpose()?;
        let password = self.password_file.as_mut().map(SecretFile::password).transpose()?;
        for address in &mut addresses {
            if let Some((username, password)) = &user_and_password {
                address.username.clone_from(username);
                address.set_password(password.clone());
            }
            if let Some(password) = &password {
                address.set_password(password.clone());
            }
            self.tls_options.apply(address)?;
        }
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file(name: &str) -> SecretFile {
        let path = std::env::temp_dir().join(format!("qconsume-nodes-{name}-{}", std::process::id()));
        SecretFile::new(path, format!("--{name}"))
    }

    fn read(nodes: &mut Nodes) -> (String, String) {
        nodes.read().unwrap();
        let address = &nodes.addresses[0];
        (address.username.clone(), address.password.expose().to_owned())
    }

    #[test]
    fn a_file_is_read_again_and_may_begin_with_a_byte_order_mark() {
        let urls = file("url-file");
        let path = urls.path.clone();
        let mut nodes = Nodes { url_file: Some(urls), ..Nodes::default() };
        assert_eq!(nodes.read().unwrap_err().exit, Exit::Config);
        for (text, password) in [("amqp://u:one@h\n", "one"), ("\u{feff}amqp://u:two@h", "two")] {
            fs::write(&path, text).unwrap();
            assert_eq!(read(&mut nodes).1, password);
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(nodes.read().unwrap_err().exit, Exit::Config);
        assert!(nodes.may_change());
    }

    #[test]
    fn a_pipe_is_read_once() {
        let mut pipe = file("pipe");
        nix::unistd::mkfifo(&pipe.path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let path = pipe.path.clone();
        let writer = std::thread::spawn(move || fs::write(path, "token\n"));
        for _ in 0..2 {
            assert_eq!(pipe.password().unwrap().expose(), "token");
            assert!(!pipe.may_change());
        }
        writer.join().unwrap().unwrap();
        fs::remove_file(&pipe.path).unwrap();
    }

    #[test]
    fn a_password_file_takes_precedence_over_every_other_password_and_one_newline_is_dropped() {
        let files = [file("url-file-2"), file("authfile"), file("password-file")];
        let [urls, authfile, passwords] = files.clone().map(|file| file.path);
        fs::write(&urls, "amqp://u:url@h,amqp://u:url@i").unwrap();
        fs::write(&authfile, "username:someone\npassword:auth\n").unwrap();
        let [url_file, auth, password_file] = files.map(Some);
        let mut nodes = Nodes { url_file, ..Nodes::default() };
        assert_eq!(read(&mut nodes), ("u".to_owned(), "url".to_owned()));
        nodes.authfile = auth;
        assert_eq!(read(&mut nodes), ("someone".to_owned(), "auth".to_owned()));
        nodes.password_file = password_file;
        for (text, password) in
            [("token", "token"), ("token\n", "token"), ("\u{feff}token\r\n", "token"), ("a\n\n", "a\n")]
        {
            fs::write(&passwords, text).unwrap();
            assert_eq!(read(&mut nodes), ("someone".to_owned(), password.to_owned()));
            assert_eq!(nodes.addresses[1].password, nodes.addresses[0].password);
        }
        // The file is empty for a moment.
        fs::write(&passwords, "\n").unwrap();
        let failure = nodes.read().unwrap_err();
        assert_eq!((failure.exit, failure.message.ends_with("is empty")), (Exit::Config, true), "{failure}");
        assert_eq!(nodes.addresses[0].password.expose(), "a\n");
        for path in [urls, authfile, passwords] {
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn with_a_password_file_the_client_certificate_does_not_log_in() {
        let passwords = file("password-file-2");
        fs::write(&passwords.path, "token").unwrap();
        let path = passwords.path.clone();
        let tls_options = TlsOptions { cert: Some("/no/such.pem".into()), ..TlsOptions::default() };
        let addresses = parse_list("amqps://u@h").unwrap();
        let mut nodes = Nodes { addresses, tls_options, ..Nodes::default() };
        assert!(nodes.read_addresses().unwrap()[0].logs_in_by_certificate());
        nodes.password_file = Some(passwords);
        assert!(!nodes.read_addresses().unwrap()[0].logs_in_by_certificate());
        fs::remove_file(path).unwrap();
    }
}
