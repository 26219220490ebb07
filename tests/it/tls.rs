//! TLS with a real RabbitMQ: certificates good and bad, in both directions.

use crate::common::qconsume;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};
use testbed::{
    Broker, Finished, Port, Program,
    certificates::{Identity, authority, identity},
    emulator_lacks, missing,
    owner::{find_in_path, is_root, temp_folder},
    peer::{Answer, Peer},
    rcgen::{CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, KeyPair, date_time_ymd},
    reserve_port,
};

/// What must end at once may wait so long for the broker; a test that gets there fails.
const CONNECT_TIMEOUT: &str = "25s";

/// A broker with TLS, and the files to reach it with.
struct Site {
    broker: Broker,
    /// Where a client's certificate is welcome.
    tls: Port,
    /// Where one is required.
    mutual: Port,
    ca: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

/// The one site, for one test at a time: some change the broker's certificate.
fn site() -> MutexGuard<'static, Site> {
    static SITE: OnceLock<Mutex<Site>> = OnceLock::new();
    let site = SITE.get_or_init(|| Mutex::new(Site::start()));
    site.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who may log in with this certificate.
fn named(user: &str) -> impl FnOnce(&mut CertificateParams) {
    let user = user.to_owned();
    move |params| params.distinguished_name.push(DnType::CommonName, user)
}

/// What a broker's certificate should be for.
const NAMES: [&str; 2] = ["localhost", "127.0.0.1"];

impl Site {
    fn start() -> Self {
        let ca = authority("the tests' CA");
        let server = identity(&ca, &NAMES, |_| {});
        let (tls, mutual) = (reserve_port().unwrap(), reserve_port().unwrap());
        let broker = Broker::options()
            .config(&format!("listeners.ssl.1 = 127.0.0.1:{}", tls.number()))
            .config(
                "ssl_options.cacertfile = $folder/ca.pem\n\
                 ssl_options.certfile = $folder/server.pem\n\
                 ssl_options.keyfile = $folder/server.key\n\
                 ssl_options.verify = verify_peer\n\
                 ssl_options.fail_if_no_peer_cert = false\n\
                 ssl_cert_login_from = common_name\n\
                 auth_mechanisms.1 = PLAIN\n\
                 auth_mechanisms.2 = AMQPLAIN\n\
                 auth_mechanisms.3 = EXTERNAL\n",
            )
            .plugin("rabbitmq_auth_mechanism_ssl")
            .file("ca.pem", &ca.as_ref().pem())
            .file("server.pem", &server.cert)
            .file("server.key", &server.key)
            .start()
            .unwrap_or_else(|error| panic!("{error:#}"));
        let folder = broker.folder().unwrap();
        let path = |name| folder.join(name).display().to_string();
        let listener = format!(
            "rabbit_networking:start_ssl_listener({{\"127.0.0.1\", {}, inet}}, [{{cacertfile, {:?}}}, \
             {{certfile, {:?}}}, {{keyfile, {:?}}}, {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}}], 1).",
            mutual.number(),
            path("ca.pem"),
            path("server.pem"),
            path("server.key"),
        );
        // All at once: each call of rabbitmqctl takes seconds.
        let set_up = format!(
            "rabbit_auth_backend_internal:add_user(<<\"worker\">>, <<\"unused\">>, <<\"tests\">>), \
             rabbit_auth_backend_internal:set_permissions(<<\"worker\">>, <<\"/\">>, <<\".*\">>, <<\".*\">>, <<\".*\">>, <<\"tests\">>), \
             {listener}"
        );
        broker.ctl(&["eval", &set_up]).unwrap();
        let site = Self { broker, tls, mutual, ca, folder: temp_folder("tls") };
        site.write("ca.pem", site.ca.as_ref().pem());
        site.write("other-ca.pem", authority("another CA").as_ref().pem());
        site
    }

    /// A file of the client's.
    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Has the broker use its good certificate again when this is dropped.
    fn restored(&self) -> impl Drop {
        struct Restored<'a>(&'a Site);
        impl Drop for Restored<'_> {
            fn drop(&mut self) {
                self.0.present(&identity(&self.0.ca, &NAMES, |_| {}));
            }
        }
        Restored(self)
    }

    /// Has the broker use another certificate for new connections.
    fn present(&self, server: &Identity) {
        let folder = self.broker.folder().unwrap();
        let write = |name: &str, content: &str| {
            let path = folder.join(name).display().to_string();
            format!("ok = file:write_file({path:?}, <<{content:?}>>), ")
        };
        let renew = write("server.pem", &server.cert) + &write("server.key", &server.key) + "ssl:clear_pem_cache().";
        self.broker.ctl(&["eval", &renew]).unwrap();
    }

    fn url(&self) -> String {
        format!("amqps://guest:guest@127.0.0.1:{}", self.tls.number())
    }

    /// A worker that trusts the tests' CA.
    fn worker(&self, url: &str) -> Program {
        self.plain_worker(url).env("QCONSUME_CACERT", self.file("ca.pem"))
    }

    fn plain_worker(&self, url: &str) -> Program {
        qconsume()
            .url(url)
            .env("QCONSUME_CONNECT_TIMEOUT", CONNECT_TIMEOUT)
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR")
    }

    /// Runs it with a message to take, which it takes.
    #[track_caller]
    fn takes(&self, program: Program) {
        let queue = self.broker.queue("tls");
        queue.publish("over TLS");
        let ended = program.queue(queue.name()).arg("--").arg("cat").run();
        ended.assert_status(0);
        assert_eq!(ended.stdout_text(), "over TLS");
        queue.wait_ready(0);
    }

    /// Runs it with a message to take, which stays where it is, and checks what it ends with: at once.
    #[track_caller]
    fn refuses(&self, program: Program, status: i32, text: &str) -> Finished {
        let queue = self.broker.queue("tls");
        queue.publish("stays");
        let ended = program.queue(queue.name()).arg("--").arg("cat").run();
        ended.assert_status(status).assert_stderr(text);
        assert!(ended.wall < Duration::from_secs(20), "{:?}", ended.wall);
        assert!(ended.stdout.is_empty());
        // A connection that the broker resets may take the broker's answer with it: then it is tried once more.
        let last = ended.stderr.lines().last().unwrap();
        assert!(last.contains(text), "{}", ended.stderr);
        assert!(!ended.stderr.contains("guest:"), "{}", ended.stderr);
        queue.wait_ready(1);
        ended
    }
}

#[test]
fn a_ca_can_be_named_in_every_way() {
    let site = site();
    let ca = site.file("ca.pem");
    let url = site.url();
    let port = site.tls.number().to_string();
    site.takes(site.plain_worker(&url).arg("--cacert").arg(&ca));
    site.takes(site.plain_worker(&url).env("QCONSUME_CACERT", &ca));
    site.takes(site.plain_worker(&url).env("SSL_CERT_FILE", &ca));
    let with_parameter = format!("{url}?cacertfile={}", ca.display());
    site.takes(site.plain_worker(&with_parameter));
    // As amqp-consume is told to.
    site.takes(
        site.plain_worker("")
            .env_remove("BROKER_URL")
            .args(["-s", "localhost", "--port", &port, "--ssl"])
            .args(["--username=guest", "--password=guest", "--no-default-cert-paths"])
            .arg(format!("--cacert={}", ca.display())),
    );
    // One of several in a file.
    let bundle = [fs::read(site.file("other-ca.pem")).unwrap(), fs::read(&ca).unwrap()].concat();
    let bundle = site.write("bundle.pem", bundle);
    site.takes(site.plain_worker(&url).arg("--cacert").arg(bundle));
}

#[test]
fn the_brokers_certificate_is_checked_for_the_name_that_was_asked_for() {
    let site = site();
    let local = format!("amqps://guest:guest@localhost:{}", site.tls.number());
    site.takes(site.worker(&local));
    let _restored = site.restored();
    site.present(&identity(&site.ca, &["rabbit.example"], |_| {}));
    site.refuses(
        site.worker(&local),
        78,
        "certificate is for rabbit.example, not for localhost: connect by a name that it is for, or give that name with --server-name",
    );
    site.refuses(site.worker(&site.url()), 78, "is for rabbit.example, not for 127.0.0.1");
    site.takes(site.worker(&local).args(["--server-name", "rabbit.example"]));
    site.takes(site.worker(&local).env("QCONSUME_SERVER_NAME", "rabbit.example"));
    site.takes(site.worker(&format!("{local}?server_name_indication=rabbit.example")));
    site.refuses(
        site.worker(&local).args(["--server-name", "other.example"]),
        78,
        "is for rabbit.example, not for other.example",
    );
    // A common name is no name.
    site.present(&identity(&site.ca, &[], named("localhost")));
    site.refuses(site.worker(&local), 78, "is for no name at all (a common name alone doesn't count)");
}

#[test]
fn a_broker_that_cannot_be_trusted_is_refused_at_once() {
    let site = site();
    let url = site.url();
    let other = site.file("other-ca.pem");
    let ended = site.refuses(
        site.plain_worker(&url).arg("--cacert").arg(&other),
        78,
        "certificate is signed by an unknown issuer",
    );
    ended.assert_stderr("other-ca.pem").assert_stderr("--cacert");
    // The system's CAs don't know the tests' one.
    if Path::new("/etc/ssl/certs/ca-certificates.crt").exists() {
        site.refuses(site.plain_worker(&url), 78, "none of the system's CA certificates");
    } else {
        missing("the system's CA certificates");
    }
    let _restored = site.restored();
    let bad: [(&str, Identity); 4] = [
        (
            "expired at 2021-01-01T00:00:00Z; it is ",
            identity(&site.ca, &NAMES, |params| {
                params.not_before = date_time_ymd(2020, 1, 1);
                params.not_after = date_time_ymd(2021, 1, 1);
            }),
        ),
        (
            "is not valid before 4001-01-01T00:00:00Z; it is ",
            identity(&site.ca, &NAMES, |params| {
                params.not_before = date_time_ymd(4001, 1, 1);
            }),
        ),
        (
            "is not one for servers",
            identity(&site.ca, &NAMES, |params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }),
        ),
        ("is that of a CA itself", Identity { cert: site.ca.as_ref().pem(), key: site.ca.key().serialize_pem() }),
    ];
    for (text, server) in bad {
        site.present(&server);
        site.refuses(site.worker(&url), 78, text);
    }
    // Signed by nobody but itself, it is trusted by whoever names it.
    let key = KeyPair::generate().unwrap();
    let names = NAMES.map(str::to_owned);
    let own = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
    site.present(&Identity { cert: own.pem(), key: key.serialize_pem() });
    site.refuses(site.worker(&url), 78, "is signed by an unknown issuer");
    let own = site.write("own.pem", own.pem());
    site.takes(site.plain_worker(&url).arg("--cacert").arg(own));
}

#[test]
fn a_port_for_something_else_is_told_apart() {
    let site = site();
    let plain = format!("amqps://guest:guest@127.0.0.1:{}", site.broker.port());
    site.refuses(site.worker(&plain), 78, "what answers isn't TLS: is the port right");
    let crossed = format!("amqp://guest:guest@127.0.0.1:{}", site.tls.number());
    let done = site.plain_worker(&crossed).queue("q").args(["--", "cat"]).run();
    done.assert_stderr("amqps://");
    // The broker sends an alert and resets the connection. On a slow machine the reset takes the alert with it.
    assert!([78, 69].contains(&done.status()), "{}", done.stderr);
    let unexpected_message = vec![21, 3, 3, 0, 2, 2, 10];
    let alerts = Peer::new(move |_| Answer::Last(unexpected_message.clone()));
    site.refuses(site.plain_worker(&alerts.url()), 78, "amqps://");
}

#[test]
fn a_client_certificate_logs_in_where_no_password_is_given() {
    let site = site();
    let client = identity(&site.ca, &[], named("worker"));
    let cert = site.write("worker.pem", &client.cert);
    let key = site.write("worker.key", &client.key);
    let both = site.write("both.pem", client.cert.clone() + &client.key);
    for port in [site.tls.number(), site.mutual.number()] {
        let url = format!("amqps://127.0.0.1:{port}");
        site.takes(site.worker(&url).arg("--cert").arg(&cert).arg("--key").arg(&key));
        site.takes(site.worker(&url).env("QCONSUME_CERT", &both));
    }
    // Told to.
    let url = format!(
        "amqps://guest:guest@127.0.0.1:{}?auth_mechanism=external&certfile={}&keyfile={}",
        site.mutual.number(),
        cert.display(),
        key.display()
    );
    site.takes(site.worker(&url));
    // It isn't asked who it is: a wrong password is refused though the certificate is good.
    let wrong = format!("amqps://guest:wrong-secret@127.0.0.1:{}", site.mutual.number());
    let ended = site.refuses(site.worker(&wrong).env("QCONSUME_CERT", &both), 77, "login of user \"guest\"");
    assert!(!ended.stderr.contains("wrong-secret"), "{}", ended.stderr);
    // A certificate for a user that isn't there.
    let stranger = identity(&site.ca, &[], named("stranger"));
    let stranger = site.write("stranger.pem", stranger.cert + &stranger.key);
    let url = format!("amqps://127.0.0.1:{}", site.mutual.number());
    site.refuses(site.worker(&url).env("QCONSUME_CERT", stranger), 77, "by client certificate (EXTERNAL)");
}

#[test]
fn a_broker_without_external_is_no_reason_to_try_again() {
    let site = site();
    let client = identity(&site.ca, &[], named("worker"));
    let client = site.write("client.pem", client.cert + &client.key);
    let offer = |mechanisms: &str| {
        let set = format!("application:set_env(rabbit, auth_mechanisms, {mechanisms}).");
        site.broker.ctl(&["eval", &set]).unwrap();
    };
    offer("['PLAIN', 'AMQPLAIN']");
    let url = format!("amqps://127.0.0.1:{}", site.mutual.number());
    let queue = site.broker.queue("tls");
    let ended = site.worker(&url).env("QCONSUME_CERT", client).queue(queue.name()).args(["--", "cat"]).run();
    offer("['PLAIN', 'AMQPLAIN', 'EXTERNAL']");
    ended.assert_status(78).assert_stderr("rabbitmq_auth_mechanism_ssl");
    assert!(!ended.stderr.contains("trying again"), "{}", ended.stderr);
}

#[test]
fn keys_are_read_in_all_their_forms() {
    if find_in_path("openssl").is_none() {
        missing("openssl");
        return;
    }
    let site = site();
    let openssl = |arguments: &[&str]| {
        let ran = Command::new("openssl").args(arguments).current_dir(&site.folder).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    };
    let url = format!("amqps://127.0.0.1:{}", site.mutual.number());
    let client = identity(&site.ca, &[], named("worker"));
    site.write("ec.pem", &client.cert);
    site.write("ec.key", &client.key);
    openssl(&["ec", "-in", "ec.key", "-out", "sec1.key"]);
    openssl(&["genrsa", "-traditional", "-out", "pkcs1.key", "2048"]);
    openssl(&["pkcs8", "-topk8", "-nocrypt", "-in", "pkcs1.key", "-out", "rsa.key"]);
    openssl(&["pkcs8", "-topk8", "-in", "ec.key", "-passout", "pass:words", "-out", "locked.key"]);
    openssl(&["x509", "-in", "ec.pem", "-outform", "der", "-out", "ec.der"]);
    let rsa = KeyPair::from_pem(&fs::read_to_string(site.file("rsa.key")).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    named("worker")(&mut params);
    site.write("rsa.pem", params.signed_by(&rsa, &*site.ca).unwrap().pem());
    let ed25519 = KeyPair::generate_for(&testbed::rcgen::PKCS_ED25519).unwrap();
    let mut params = CertificateParams::default();
    named("worker")(&mut params);
    site.write("ed.pem", params.signed_by(&ed25519, &*site.ca).unwrap().pem());
    site.write("ed.key", ed25519.serialize_pem());
    for (cert, key, header) in [
        ("ed.pem", "ed.key", "BEGIN PRIVATE KEY"),
        ("ec.pem", "ec.key", "BEGIN PRIVATE KEY"),
        ("ec.pem", "sec1.key", "BEGIN EC PRIVATE KEY"),
        ("rsa.pem", "rsa.key", "BEGIN PRIVATE KEY"),
        ("rsa.pem", "pkcs1.key", "BEGIN RSA PRIVATE KEY"),
    ] {
        let text = fs::read_to_string(site.file(key)).unwrap();
        assert!(text.contains(header), "{key}");
        let worker = site.worker(&url).arg("--cert").arg(site.file(cert));
        site.takes(worker.arg("--key").arg(site.file(key)));
    }
    let worker = |key: &str| site.worker(&url).arg("--cert").arg(site.file("ec.pem")).arg("--key").arg(site.file(key));
    site.refuses(worker("locked.key"), 78, "locked.key is encrypted with a passphrase");
    site.refuses(worker("rsa.key"), 78, "is not the one of the client certificate");
    let der = site.worker(&url).arg("--cacert").arg(site.file("ec.der"));
    site.refuses(der, 78, "looks like DER");

    // What rustls doesn't take is said in words.
    openssl(&["ecparam", "-name", "secp521r1", "-genkey", "-noout", "-out", "p521.key"]);
    let subject = ["-subj", "/CN=worker"];
    openssl(&[&["req", "-x509", "-key", "p521.key", "-out", "p521.pem"][..], &subject].concat());
    openssl(&[&["req", "-new", "-key", "rsa.key", "-out", "v1.csr"][..], &subject].concat());
    openssl(&["x509", "-req", "-in", "v1.csr", "-signkey", "rsa.key", "-out", "v1.pem"]);
    openssl(&["genrsa", "-out", "short.key", "1024"]);
    openssl(&[&["req", "-x509", "-key", "short.key", "-out", "short.pem"][..], &subject].concat());
    openssl(&["genpkey", "-algorithm", "ed25519", "-out", "ed25519.key"]);
    openssl(&["genpkey", "-algorithm", "ed448", "-out", "ed448.key"]);
    openssl(&[&["req", "-x509", "-key", "ed448.key", "-out", "ed448.pem"][..], &subject].concat());
    openssl(&["pkey", "-in", "ec.key", "-pubout", "-out", "public.key"]);
    openssl(&["pkcs12", "-export", "-in", "ec.pem", "-inkey", "ec.key", "-passout", "pass:words", "-out", "ec.p12"]);
    for (cert, key, says) in [
        ("p521.pem", "p521.key", "P-521 is not supported"),
        ("ed448.pem", "ed448.key", "the key in "),
        ("short.pem", "short.key", "RSA with 2048 to 4096 bits"),
        ("v1.pem", "rsa.key", "X.509 version 1"),
        ("ec.pem", "ed25519.key", "is not the one of the client certificate"),
        ("ec.pem", "public.key", "only PEM of another kind: PUBLIC KEY"),
        ("v1.csr", "rsa.key", "only PEM of another kind: CERTIFICATE REQUEST"),
        ("ec.p12", "ec.key", "it is PKCS#12 (.p12, .pfx), which `openssl pkcs12 -nodes` turns into PEM"),
    ] {
        let worker = site.worker(&url).arg("--cert").arg(site.file(cert));
        let ended = site.refuses(worker.arg("--key").arg(site.file(key)), 78, says);
        assert!(!ended.stderr.contains(['{', '[']), "{}", ended.stderr);
    }
}

/// What becomes of each certificate that certificates.sh makes for a broker: it works, or the words of the refusal. The
/// tables in docs/tls.md say the same.
const CERTIFICATES: [(&str, Result<(), &str>); 48] = [
    ("key-RSA2048", Ok(())),
    ("key-RSA4096", Ok(())),
    ("key-secp384r1", Ok(())),
    ("key-ED25519", Ok(())),
    ("key-RSA1024", Err("an RSA key below 2048 bits")),
    ("key-secp521r1", Err("key or signature in common")),
    ("key-secp256k1", Err("key or signature in common")),
    ("key-ED448", Err("its key or its CA's is Ed448")),
    ("by-secp384r1", Ok(())),
    ("by-ED25519", Ok(())),
    ("by-RSA1024", Err("an RSA key below 2048 bits")),
    ("by-RSA-PSS", Err("signed with RSA-PSS with SHA-1, with a salt")),
    ("by-secp521r1", Err("its key or its CA's is ECDSA with the curve P-521")),
    ("by-ED448", Err("signed with Ed448")),
    ("ec-sha256", Ok(())),
    ("ec-sha384", Ok(())),
    ("rsa-sha256", Ok(())),
    ("rsa-sha384", Ok(())),
    ("rsa-sha512", Ok(())),
    ("pss-sha256", Ok(())),
    ("pss-sha384", Ok(())),
    ("pss-sha512", Ok(())),
    ("ec-sha1", Err("key or signature in common")),
    ("ec-sha512", Err("signed with ECDSA with SHA-512")),
    ("rsa-sha1", Err("key or signature in common")),
    ("pss-sha1", Err("key or signature in common")),
    ("pss-long-salt", Err("signed with RSA-PSS")),
    ("wildcard", Ok(())),
    ("ip-as-dns", Err("issue it with subjectAltName=IP:127.0.0.1")),
    ("uri", Err("is for no name at all")),
    ("usage-both", Ok(())),
    ("key-usage-ignored", Ok(())),
    ("unknown", Ok(())),
    ("by-version-1", Ok(())),
    ("with-intermediate", Ok(())),
    ("intermediate-trusted", Ok(())),
    ("below6", Ok(())),
    ("usage-any", Err("lacks serverAuth")),
    ("usage-empty", Err("its extended key usage is empty")),
    ("unknown-critical", Err("a critical extension that qconsume doesn't know")),
    ("version-1", Err("X.509 version 1")),
    ("again", Err("created again under the same name")),
    ("again-rsa", Err("created again under the same name")),
    ("intermediate-missing", Err("signed by an unknown issuer")),
    ("by-no-ca", Err("a certificate that is not a CA's")),
    ("path-too-long", Err("fewer intermediate CAs than there are (pathlen)")),
    ("outside-names", Err("isn't allowed to issue certificates for its names")),
    ("below7", Err("more than six intermediate CAs")),
];

#[test]
fn every_kind_of_certificate_works_or_is_refused_in_words() {
    if find_in_path("openssl").is_none() {
        missing("openssl");
        return;
    }
    let site = site();
    // The client does the checking, so one broker is enough.
    if !site.broker.folder().is_some_and(|folder| folder.is_dir()) {
        return testbed::version_lacks("this machine's files, as it runs in a container");
    }
    let folder = temp_folder("certificates");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/certificates.sh");
    let made = Command::new("sh").arg(script).current_dir(&folder).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let path = |name: &str, suffix: &str| folder.join(format!("{name}.{suffix}")).display().to_string();
    let ports = CERTIFICATES.map(|_| reserve_port().unwrap());
    // A listener for each, all at once: each call of rabbitmqctl takes seconds.
    let listeners: Vec<_> = CERTIFICATES
        .iter()
        .zip(&ports)
        .map(|((name, _), port)| {
            format!(
                "rabbit_networking:start_ssl_listener({{\"127.0.0.1\", {}, inet}}, \
                 [{{certfile, {:?}}}, {{keyfile, {:?}}}, {{verify, verify_none}}], 1)",
                port.number(),
                path(name, "pem"),
                path(name, "key"),
            )
        })
        .collect();
    site.broker.ctl(&["eval", &(listeners.join(", ") + ".")]).unwrap();
    let mut wrong = Vec::new();
    for ((name, expected), port) in CERTIFICATES.iter().zip(&ports) {
        let host = if *name == "ip-as-dns" { "127.0.0.1" } else { "localhost" };
        let expected_name = if *name == "wildcard" { "one.rabbit.example" } else { host };
        let queue = site.broker.queue("tls");
        queue.publish("over TLS");
        let ended = site
            .plain_worker(&format!("amqps://guest:guest@{host}:{}", port.number()))
            .env("QCONSUME_CACERT", path(name, "ca.pem"))
            .env("QCONSUME_SERVER_NAME", expected_name)
            .env("QCONSUME_CONNECT_TIMEOUT", "30s")
            .queue(queue.name())
            .args(["--", "cat"])
            .run();
        let status = ended.code;
        let as_expected = match expected {
            Ok(()) => status == Some(0) && ended.stdout_text() == "over TLS",
            Err(text) => {
                let line = ended.stderr.lines().last().unwrap_or_default();
                status == Some(78) && line.contains(text) && !ended.stderr.contains("trying again")
            }
        };
        // No dump of Rust's: neither a field's brackets, nor an enum's name.
        let is_dump = ended.stderr.contains(['{', '[']) || ended.stderr.contains("Error(");
        if !as_expected || is_dump {
            wrong.push(format!("{name}: expected {expected:?}: {status:?} {}", ended.stderr));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_broker_that_refuses_the_client_is_not_asked_again() {
    let site = site();
    let url = format!("amqps://127.0.0.1:{}", site.mutual.number());
    let other = authority("another CA");
    let foreign = identity(&other, &[], named("worker"));
    let foreign = site.write("foreign.pem", foreign.cert + &foreign.key);
    let old = identity(&site.ca, &[], |params| {
        named("worker")(params);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let old = site.write("old.pem", old.cert + &old.key);
    let with_password = format!("amqps://guest:guest@127.0.0.1:{}", site.mutual.number());
    site.refuses(site.worker(&with_password), 78, "without a client certificate");
    site.refuses(site.worker(&url).arg("--cert").arg(foreign), 78, "foreign.pem: it is signed by none of the CAs");
    site.refuses(site.worker(&url).arg("--cert").arg(old), 78, "old.pem: it has expired");
}

/// Without a broker: files are read before anything is connected, or this would end with 69.
#[test]
fn files_are_read_before_the_broker_is_touched() {
    let folder = temp_folder("files");
    let file = |name: &str, content: &str| {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    };
    let ca = authority("a CA");
    let client = identity(&ca, &[], named("worker"));
    let other = identity(&ca, &[], named("other"));
    let good = file("good.pem", &ca.as_ref().pem());
    let cert = file("cert.pem", &client.cert);
    let key = file("key.pem", &client.key);
    let other_key = file("other.key", &other.key);
    let text = file("text", "secret words\n");
    let empty = file("empty", "");
    let cut = file("cut.pem", &client.cert[..200]);
    let cut_key = file("cut.key", &client.key[..100]);
    let garbled = file("garbled.pem", &client.cert.replace('M', "!"));
    let not_there = folder.join("not-there").display().to_string();
    let table: &[(&[&str], i32, &str)] = &[
        (&["--cacert", &not_there], 78, "not-there can't be read: No such file"),
        (&["--cacert", &folder.display().to_string()], 78, "can't be read: Is a directory"),
        (&["--cacert", &text], 78, "it isn't PEM"),
        (&["--cacert", &empty], 78, "the file is empty"),
        (&["--cacert", &key], 78, "only PEM of another kind"),
        (&["--cacert", &cut], 78, "is damaged PEM: its end is missing"),
        (&["--cacert", &garbled], 78, "is damaged PEM: its base64 can't be decoded"),
        (&["--cert", &cert, "--key", &other_key], 78, "is not the one of the client certificate"),
        (&["--cert", &cert, "--key", &not_there], 78, "the key "),
        (&["--cert", &cert, "--key", &text], 78, "there is no key in"),
        (&["--cert", &cert, "--key", &cert], 78, "only PEM of another kind"),
        (&["--cert", &cert, "--key", &cut_key], 78, "is damaged PEM"),
        (&["--cert", &cert], 78, "name its file with --key"),
        (&["--cert", &text, "--key", &key], 78, "there is no client certificate in"),
        (&["--key", &key], 64, "no client certificate: name that with --cert"),
        (&["--server-name", "no name"], 64, "is neither a DNS name nor an IP address"),
    ];
    for (arguments, status, text) in table {
        let mut worker = qconsume().url("amqps://127.0.0.1:1").queue("q");
        if !arguments.contains(&"--cacert") {
            worker = worker.args(["--cacert", &good]);
        }
        // That there is no such command is found out later.
        let ended = worker.args(*arguments).args(["--", "no-such-command"]).run();
        ended.assert_status(*status).assert_stderr(text);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        for secret in ["secret words", &client.key[40..60]] {
            assert!(!ended.stderr.contains(secret), "{}", ended.stderr);
        }
    }
    // With a good set the next thing is the command; a byte order mark is none of the file's.
    let good = file("marked.pem", &format!("\u{feff}{}", ca.as_ref().pem()));
    let ended = qconsume()
        .url("amqps://127.0.0.1:1")
        .queue("q")
        .args(["--cacert", &good, "--cert", &cert, "--key", &key])
        .args(["--", "no-such-command"])
        .run();
    ended.assert_status(127);
}

/// A shortage of descriptors may pass, so it is never a file's fault.
#[test]
fn files_that_find_no_descriptor_are_a_shortage() {
    if emulator_lacks("a start with so few descriptors") {
        return;
    }
    let folder = temp_folder("descriptors");
    let ca = folder.join("ca.pem");
    fs::write(&ca, authority("a CA").as_ref().pem()).unwrap();
    let secret = folder.join("secret");
    fs::write(&secret, "secret").unwrap();
    for file in ["--cacert", "--password-file", "SSL_CERT_FILE"] {
        let line = "ulimit -n 3; exec \"$0\" \"$@\"";
        let program = qconsume().through(["sh", "-c", line]).url("amqps://127.0.0.1:1").queue("q");
        let program = match file {
            "--cacert" => program.arg(file).arg(&ca),
            "--password-file" => program.arg(file).arg(&secret),
            _ => program.env(file, &ca),
        };
        let ended = program.args(["--", "true"]).run();
        ended.assert_status(71).assert_stderr("can't be read: no more files may be open in one process (ulimit -n)");
    }
}

#[test]
fn an_image_without_ca_files_is_told_so() {
    let ended = qconsume()
        .url("amqps://127.0.0.1:1")
        .queue("q")
        .env("SSL_CERT_FILE", "/not/there.pem")
        .env_remove("SSL_CERT_DIR")
        .args(["--", "true"])
        .run();
    ended
        .assert_status(78)
        .assert_stderr("there are no CA certificates in SSL_CERT_FILE=/not/there.pem")
        .assert_stderr("--cacert");
    if !is_root() || find_in_path("chroot").is_none() {
        missing("root and chroot");
        return;
    }
    if emulator_lacks("a file that is the program itself") {
        return;
    }
    let image = temp_folder("image");
    fs::copy(crate::common::qconsume_path(), image.join("qconsume")).unwrap();
    let program = || {
        Program::new("/qconsume")
            .through(["chroot".as_ref(), image.as_os_str()])
            .queue("q")
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR")
            .args(["--connect-timeout", "1s", "--", "/qconsume"])
    };
    let ended = program().url("amqps://127.0.0.1:1").run();
    ended.assert_status(78).assert_stderr(
        "there are no CA certificates on this system to check the broker's with: name the broker's CA with --cacert FILE (QCONSUME_CACERT), or install the package ca-certificates",
    );
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    // Who doesn't use TLS needs none.
    program().url("amqp://127.0.0.1:1").run().assert_status(69);
}
