use std::{net::Ipv6Addr, ops::RangeInclusive, path::PathBuf, time::Duration};

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::*;

/// `amqp://guest:guest@localhost:5672/`, with nothing given.
fn defaults() -> Address {
    Address {
        tls: false,
        host: "localhost".to_owned(),
        port: 5672,
        username: "guest".to_owned(),
        password: Secret("guest".to_owned()),
        password_given: false,
        virtual_host: "/".to_owned(),
        parameters: Parameters::default(),
    }
}

impl Address {
    fn tls(self) -> Self {
        Self { tls: true, port: 5671, ..self }
    }

    fn host(self, host: &str) -> Self {
        Self { host: host.to_owned(), ..self }
    }

    fn port(self, port: u16) -> Self {
        Self { port, ..self }
    }

    fn username(self, username: &str) -> Self {
        Self { username: username.to_owned(), ..self }
    }

    fn password(self, password: &str) -> Self {
        Self { password: Secret(password.to_owned()), password_given: true, ..self }
    }

    fn virtual_host(self, name: &str) -> Self {
        Self { virtual_host: name.to_owned(), ..self }
    }
}

#[track_caller]
fn assert_parses(table: Vec<(&str, Address)>) {
    for (url, address) in table {
        assert_eq!(Address::parse(url), Ok(address.clone()), "{url}");
        assert_eq!(parse_list(url), Ok(vec![address]), "{url}");
    }
}

#[track_caller]
fn assert_refused(table: &[(&str, &str)]) {
    for (url, message) in table {
        let error = parse_list(url).expect_err(url);
        assert_eq!(error.to_string(), *message, "{url}");
        assert_no_secret(&error);
        assert!(!message.contains('\n'), "{url}");
    }
}

#[track_caller]
fn assert_no_secret(shown: &(impl fmt::Debug + fmt::Display)) {
    for text in [shown.to_string(), format!("{shown:?}")] {
        assert!(!text.contains("S3CRET"), "{text}");
    }
}

#[test]
fn examples_of_the_specification() {
    // https://www.rabbitmq.com/docs/uri-spec#appendix-a-examples, all of them, in its order.
    let user = || defaults().username("user");
    assert_parses(vec![
        ("amqp://user:pass@host:10000/vhost", user().password("pass").host("host").port(10000).virtual_host("vhost")),
        (
            "amqp://user%61:%61pass@ho%61st:10000/v%2fhost",
            defaults().username("usera").password("apass").host("hoast").port(10000).virtual_host("v/host"),
        ),
        ("amqp://", defaults()),
        // The specification's virtual host is "" here and in `amqp://host/`: our one difference.
        ("amqp://:@/", defaults().username("").password("")),
        ("amqp://user@", user()),
        ("amqp://user:pass@", user().password("pass")),
        ("amqp://host", defaults().host("host")),
        ("amqp://:10000", defaults().port(10000)),
        ("amqp:///vhost", defaults().virtual_host("vhost")),
        ("amqp://host/", defaults().host("host")),
        ("amqp://host/%2f", defaults().host("host")),
        ("amqp://[::1]", defaults().host("::1")),
    ]);
}

#[test]
fn schemes() {
    assert_parses(vec![
        ("amqps://", defaults().tls()),
        ("amqps://host", defaults().tls().host("host")),
        ("amqps://host:1", defaults().tls().host("host").port(1)),
        ("AMQP://host", defaults().host("host")),
        ("aMqPs://host", defaults().tls().host("host")),
    ]);
    let message = "the URL must start with amqp:// or amqps://";
    assert_refused(&[
        ("host", message),
        ("host:5672", message),
        ("amqp:host", message),
        ("amqp:/host", message),
        ("amqp//host", message),
        ("amqpss://host", message),
        ("http://user:S3CRET@host/", message),
        ("S3CRET", message),
        ("://S3CRET", message),
        ("\"amqp://user:S3CRET@host\"", message),
        ("ä", message),
        ("", "the URL is empty"),
    ]);
}

#[test]
fn user_names_and_passwords() {
    let user = || defaults().username("user").host("host");
    assert_parses(vec![
        ("amqp://user@host", user()),
        ("amqp://user:@host", user().password("")),
        ("amqp://:pass@host", user().username("").password("pass")),
        ("amqp://@host", user().username("")),
        ("amqp://guest:guest@host", user().username("guest").password("guest")),
        // The first colon ends the user name.
        ("amqp://user:a:b@host", user().password("a:b")),
        ("amqp://us%3Aer:a%3ab@host", user().username("us:er").password("a:b")),
        ("amqp://user:%40%2F%3f%23%25%5B%5d%26%20@host", user().password("@/?#%[]& ")),
        ("amqp://user:%2540@host", user().password("%40")),
        ("amqp://user:!$&'()*+,;=-._~@host", user().password("!$&'()*+,;=-._~")),
        ("amqp://user:[a]|^`{}\"<>\\@host", user().password("[a]|^`{}\"<>\\")),
        ("amqp://us%C3%A9r:p%e2%82%acss@host", user().username("usér").password("p€ss")),
        ("amqp://usér:p€ss@host", user().username("usér").password("p€ss")),
        ("amqp://user:a,b@host", user().password("a,b")),
        ("amqp://user:%0a%00@host", user().password("\n\0")),
    ]);
    let two_at = "there is more than one '@': in a user name or password write it as %40";
    let late_at = "there is an '@' after the first '/' or '?': in a user name or password write '/' as %2F and \
                   '?' as %3F, in a virtual host or query parameter write '@' as %40";
    assert_refused(&[
        ("amqp://user:S3CRET@S3CRET@host", two_at),
        ("amqp://user@example.com:S3CRET@host", two_at),
        ("amqp://user:S3CRET/S3CRET@host", late_at),
        ("amqp://user:123/S3CRET@host", late_at),
        ("amqp://user:123?S3CRET@host", late_at),
        ("amqp://user:1@S3CRET/S3CRET@host", late_at),
        ("amqp://user:S3CRET?S3CRET@host/vhost", late_at),
        ("amqp://us/er:S3CRET@host", late_at),
        ("amqp://user:S3CRET@host/v@host", late_at),
        ("amqps://user:S3CRET@host/?keyfile=a@b", late_at),
        ("amqp://user:S3CRET#S3CRET@host", "the URL contains a '#': write it as %23"),
        ("amqp://user:S3CRET%@host", "the password contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET%4@host", "the password contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET%%41@host", "the password contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET%4é@host", "the password contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET%+1@host", "the password contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://us%zzer:S3CRET@host", "the user name contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET%ff@host", "the password is not UTF-8 once it is percent-decoded"),
        ("amqp://us%C3er:S3CRET@host", "the user name is not UTF-8 once it is percent-decoded"),
    ]);
}

#[test]
fn hosts() {
    assert_parses(vec![
        ("amqp://rabbit.example.com", defaults().host("rabbit.example.com")),
        ("amqp://192.0.2.1:5673", defaults().host("192.0.2.1").port(5673)),
        ("amqp://a_b.default.svc", defaults().host("a_b.default.svc")),
        ("amqp://rabbit%2dmq", defaults().host("rabbit-mq")),
        ("amqp://m%C3%BCnchen", defaults().host("münchen")),
        ("amqp://[::1]:5673/", defaults().host("::1").port(5673)),
        ("amqp://[2001:DB8:0::1]/v", defaults().host("2001:db8::1").virtual_host("v")),
        ("amqp://[::ffff:192.0.2.1]", defaults().host("::ffff:192.0.2.1")),
        ("amqp://[0::1]", defaults().host("::1")),
        ("amqp://0%3A%3A1", defaults().host("::1")),
        ("amqp://[fe80:0::1%25eth0]", defaults().host("fe80::1%eth0")),
        ("amqp://a:b@[::1]", defaults().username("a").password("b").host("::1")),
        ("amqps://[::1]?heartbeat=7", {
            let mut address = defaults().tls().host("::1");
            address.parameters.heartbeat = Some(7);
            address
        }),
    ]);
    let not_ipv6 = "the host in square brackets is not an IPv6 address";
    let colon = "the host contains a ':' or a square bracket: an IPv6 address goes in square brackets, as in \
                 amqp://[::1]:5672";
    assert_refused(&[
        ("amqp://::1", colon),
        ("amqp://user:S3CRET@fe80::1:5672", colon),
        ("amqp://user:S3CRET:S3CRET", colon),
        ("amqp://host:[::1]", colon),
        ("amqp://host[::1]", colon),
        ("amqp://::1]", colon),
        ("amqp://[::1", "the host's '[' has no ']': an IPv6 address goes in square brackets, as in amqp://[::1]:5672"),
        ("amqp://[]", not_ipv6),
        ("amqp://[:::1]", not_ipv6),
        ("amqp://[::g]", not_ipv6),
        ("amqp://[host]", not_ipv6),
        ("amqp://[127.0.0.1]", not_ipv6),
        ("amqp://[v1.S3CRET]", not_ipv6),
        ("amqp://[[::1]]", not_ipv6),
        ("amqp://[fe80::1%25]", not_ipv6),
        ("amqp://[fe80::1%eth0]", "the host contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://[::1]5672", "only ':' and the port may follow the host's square brackets"),
        ("amqp://a,b:5672", "the host contains a ',': several nodes are several whole URLs, as in amqp://a,amqp://b"),
        (
            "amqp://user:S3CRET@a,",
            "the host contains a ',': several nodes are several whole URLs, as in amqp://a,amqp://b",
        ),
        ("amqp://user:S3CRET@ho%st", "the host contains a '%' without two hexadecimal digits: write '%' as %25"),
        ("amqp://user:S3CRET@ho%ffst", "the host is not UTF-8 once it is percent-decoded"),
    ]);
}

#[test]
fn ports() {
    assert_parses(vec![
        ("amqp://host:1", defaults().host("host").port(1)),
        ("amqp://host:65535", defaults().host("host").port(65535)),
        ("amqp://host:05672", defaults().host("host")),
        ("amqps://:5672", defaults().tls().port(5672)),
    ]);
    for port in
        ["0", "65536", "70000", "99999999999", "-1", "+1", "", "amqp", "56 72", "5672x", "0x10", "%35", "٣", "S3CRET"]
    {
        for host in ["host", "", "[::1]", "user:S3CRET@host", "user:S3CRET@"] {
            let url = format!("amqp://{host}:{port}/vhost");
            let error = Address::parse(&url).expect_err(&url);
            if !port.contains(' ') {
                let message = "the port must be a number from 1 to 65535";
                assert_eq!(error.to_string(), message, "{url}");
            }
            assert_no_secret(&error);
        }
    }
}

#[test]
fn virtual_hosts() {
    let long = "é".repeat(127) + "x";
    let encoded_long = format!("amqp:///{}", encode(&long));
    assert_parses(vec![
        ("amqp:///", defaults()),
        ("amqp://?", defaults()),
        ("amqp:///?", defaults()),
        ("amqp:///%2F", defaults()),
        // Celery writes `/` so.
        ("amqp:////", defaults()),
        ("amqp://h//?", defaults().host("h")),
        ("amqp:///%2f%2f", defaults().virtual_host("//")),
        ("amqp:///a%20b", defaults().virtual_host("a b")),
        ("amqp:///a:b,c", defaults().virtual_host("a:b,c")),
        ("amqp:///v%C3%A9", defaults().virtual_host("vé")),
        ("amqp:///vé", defaults().virtual_host("vé")),
        ("amqp:///%40", defaults().virtual_host("@")),
        (&encoded_long, defaults().virtual_host(&long)),
    ]);
    let slash = "the virtual host contains a '/': write it as %2F";
    let too_long = "the virtual host is longer than 255 bytes, the most that AMQP allows";
    assert_refused(&[
        ("amqp://user:S3CRET@host/a/b", slash),
        ("amqp://user:S3CRET@host/a/", slash),
        ("amqp://user:S3CRET@host/a/?heartbeat=5", slash),
        (&format!("amqp:///{long}x"), too_long),
        (
            "amqp://user:S3CRET@host/%",
            "the virtual host contains a '%' without two hexadecimal digits: write '%' as %25",
        ),
        ("amqp://user:S3CRET@host/%80", "the virtual host is not UTF-8 once it is percent-decoded"),
    ]);
}

#[test]
fn blanks_and_invisible_characters() {
    let starts = "the URL starts with a blank or another invisible character: leave it out";
    let ends = "the URL ends with a blank, a newline or another invisible character: leave it out";
    let contains = "the URL contains a blank or another invisible character: write a blank as %20";
    assert_refused(&[
        (" amqp://user:S3CRET@host", starts),
        ("\namqp://user:S3CRET@host", starts),
        ("\u{feff}amqp://user:S3CRET@host", starts),
        (" ", starts),
        ("amqp://user:S3CRET@host ", ends),
        ("amqp://user:S3CRET@host\n\n", ends),
        ("amqp://user:S3CRET@host\r", ends),
        ("amqp://user:S3CRET@host\n\r\n", ends),
        ("amqp://user:S3CRET@host\t", ends),
        ("amqp://user:S3CRET S3CRET@host", contains),
        ("amqp://user:S3CRET\n@host", contains),
        ("amqp://user:S3CRET\0@host", contains),
        ("amqp://user:S3CRET\u{a0}@host", contains),
        ("amqp://user:S3CRET@ho\u{7f}st", contains),
        ("amqp://user:S3CRET@host/a b", contains),
        ("amqp://a, amqp://user:S3CRET@b", contains),
        ("amqp://a\namqp://user:S3CRET@b", contains),
        ("\n", "the URL is empty"),
        ("\r\n", "the URL is empty"),
    ]);
    assert_eq!(Address::parse("amqp://host\n").unwrap_err().to_string(), ends, "only a list may end with a newline");
}

#[test]
fn lists() {
    let (a, b) = (defaults().host("a"), defaults().host("b"));
    for text in ["amqp://a,amqp://b", "amqp://a,AMQP://b\n", "amqp://a,amqp://b\r\n"] {
        assert_eq!(parse_list(text), Ok(vec![a.clone(), b.clone()]), "{text:?}");
    }
    assert_eq!(parse_list("amqp://a\n"), Ok(vec![a.clone()]));
    assert_eq!(
        parse_list("amqp://u:p,q,amqp@a/x,y,amqps://b?heartbeat=x,amqp://"),
        Err("URL 2 of 3: the query parameter heartbeat must be a number of seconds from 0 (the broker's proposal) to 65535"
            .to_owned()),
    );
    assert_eq!(
        parse_list("amqp://u:p,q,amqp@a/x,y,amqps://b,amqp://"),
        Ok(vec![a.username("u").password("p,q,amqp").virtual_host("x,y"), b.tls(), defaults(),]),
    );
    assert_refused(&[
        ("amqp://a,amqp://user:S3CRET@b:0,amqp://c", "URL 2 of 3: the port must be a number from 1 to 65535"),
        ("amqp://user:S3CRET@a:0,amqp://b", "URL 1 of 2: the port must be a number from 1 to 65535"),
        (",amqp://user:S3CRET@b", "URL 1 of 2: the URL is empty"),
        (
            "amqp://a,,amqp://b",
            "URL 1 of 2: the host contains a ',': several nodes are several whole URLs, as in \
             amqp://a,amqp://b",
        ),
        (
            "amqp://a,amqp://b,",
            "URL 2 of 2: the host contains a ',': several nodes are several whole URLs, as in \
             amqp://a,amqp://b",
        ),
        (
            "amqp://user:S3CRET,http://x@host",
            "there is an '@' after the first '/' or '?': in a user name or password write '/' as %2F and \
             '?' as %3F, in a virtual host or query parameter write '@' as %40",
        ),
    ]);
}

#[test]
fn query_parameters() {
    let all = "amqps://h/?heartbeat=10&connection_timeout=1500&channel_max=8&frame_max=131072\
               &auth_mechanism=external&cacertfile=/etc/ca%20file.pem&certfile=c/d.pem&keyfile=k?=.pem\
               &server_name_indication=rabbit&verify=verify_peer";
    let parameters = Parameters {
        heartbeat: Some(10),
        connection_timeout: Some(Duration::from_millis(1500)),
        channel_max: Some(8),
        frame_max: Some(131_072),
        auth_mechanism: Some(SASLMechanism::External),
        cacertfile: Some("/etc/ca file.pem".into()),
        certfile: Some("c/d.pem".into()),
        keyfile: Some("k?=.pem".into()),
        server_name_indication: Some("rabbit".to_owned()),
        ignored: Vec::new(),
    };
    let with = |change: fn(&mut Parameters)| {
        let mut address = defaults();
        change(&mut address.parameters);
        address
    };
    assert_parses(vec![
        (all, Address { parameters, ..defaults().tls().host("h") }),
        ("amqp://?", defaults()),
        ("amqp://?&&", defaults()),
        ("amqp://?heartbeat=0&", with(|p| p.heartbeat = Some(0))),
        ("amqp://?heartbeat=65535", with(|p| p.heartbeat = Some(65535))),
        ("amqp://?heartbeat=%310", with(|p| p.heartbeat = Some(10))),
        ("amqp://?channel_max=0", with(|p| p.channel_max = Some(0))),
        ("amqp://?frame_max=0", with(|p| p.frame_max = Some(0))),
        ("amqp://?frame_max=4096", with(|p| p.frame_max = Some(4096))),
        (
            "amqp://?connection_timeout=18446744073709551615",
            with(|p| p.connection_timeout = Some(Duration::from_millis(u64::MAX))),
        ),
        ("amqp://?auth_mechanism=PLAIN", with(|p| p.auth_mechanism = Some(SASLMechanism::Plain))),
        // RabbitMQ's own clients take several; the first counts.
        (
            "amqp://?auth_mechanism=plain&auth_mechanism=amqplain",
            with(|p| p.auth_mechanism = Some(SASLMechanism::Plain)),
        ),
        ("amqp://?auth_mechanism=AmqPlain", with(|p| p.auth_mechanism = Some(SASLMechanism::AMQPlain))),
    ]);
}

#[test]
fn other_clients_query_parameters() {
    // Examples from the documentation of pika, kombu and amqp091-go.
    let ignored = |url: &str| Address::parse(url).unwrap().parameters.ignored;
    for url in [
        "amqp://h/%2F?connection_attempts=3&heartbeat=3600&blocked_connection_timeout=300",
        "amqp://h/?socket_timeout=5&retry_delay=2.5&stack_timeout=9&locale=en_US&tcp_options=%7B%27a%27:1%7D",
        "amqp://h//?failover_strategy=shuffle&login_method=PLAIN&connect_timeout=4&confirm_publish=1",
        "amqps://h/?ssl_cert_reqs=required&ssl_ca_certs=/ca&ssl=true&ssl_options={}",
        "amqp://h/?ssl=false",
    ] {
        assert!(!ignored(url).is_empty(), "{url}");
    }
    assert!(ignored("amqp://h/?heartbeat=1&channel_max=1&connection_timeout=1").is_empty());
    for query in ["ssl=true", "ssl=1", "ssl_options={}", "ssl_cert_reqs=S3CRET"] {
        let key = query.split('=').next().unwrap();
        assert_refused(&[(
            &format!("amqp://user:S3CRET@host?{query}"),
            &format!("the query parameter {key} needs TLS: an amqps:// URL"),
        )]);
    }
}

#[test]
fn wrong_query_parameters() {
    let refused = |query: &str, message: &str| {
        assert_refused(&[(&format!("amqps://user:S3CRET@host/?{query}"), message)]);
    };
    for value in ["", "x", "-1", "+1", "65536", "1.5", "10s", "S3CRET"] {
        refused(
            &format!("heartbeat={value}"),
            "the query parameter heartbeat must be a number of seconds from 0 (the broker's proposal) to 65535",
        );
    }
    for value in ["", "0", "-1", "18446744073709551616", "1s"] {
        refused(
            &format!("connection_timeout={value}"),
            "the query parameter connection_timeout must be a number of milliseconds from 1",
        );
    }
    refused("channel_max=65536", "the query parameter channel_max must be a number from 0 (no limit) to 65535");
    for value in ["", "1", "4095", "4294967296"] {
        refused(
            &format!("frame_max={value}"),
            &format!(
                "the query parameter frame_max must be 0 (the default, {FRAME_MAX}) or a number of bytes from 4096"
            ),
        );
    }
    for value in ["", "S3CRET", "anonymous", "plain,external"] {
        refused(
            &format!("auth_mechanism={value}"),
            "the query parameter auth_mechanism must be plain, amqplain or external",
        );
    }
    for key in ["cacertfile", "certfile", "keyfile"] {
        let message = format!("the query parameter {key} must be the path of a file");
        refused(key, &message);
        refused(&format!("{key}="), &message);
    }
    for value in ["", "=", "=disable"] {
        refused(
            &format!("server_name_indication{value}"),
            "the query parameter server_name_indication must be a name: the broker's certificate is always checked",
        );
    }
    for value in ["", "=", "=verify_none", "=S3CRET"] {
        refused(
            &format!("verify{value}"),
            "the query parameter verify must be verify_peer: the broker's certificate is always checked",
        );
    }
    let known = "(known: heartbeat, connection_timeout, channel_max, frame_max, auth_mechanism, cacertfile, \
                 certfile, keyfile, server_name_indication, verify)";
    for key in ["depth", "password", "heartbeats", "Heartbeat", "x", "a-b_C9", &"k".repeat(40)] {
        refused(&format!("{key}=S3CRET"), &format!("the query parameter {key} is unknown {known}"));
    }
    let nameless = ["=S3CRET", "=", "S3CRET!", "heart%62eat=S3CRET", "sché", "a?b", &"S3CRETx".repeat(6)];
    for pair in nameless {
        refused(pair, &format!("a query parameter is unknown {known}"));
    }
    refused("heartbeat=1&heartbeat=1", "the query parameter heartbeat is there twice");
    refused("verify=verify_peer&heartbeat=1&verify=verify_peer", "the query parameter verify is there twice");
    refused(
        "keyfile=S3CRET%zz",
        "the query parameter keyfile contains a '%' without two hexadecimal digits: write '%' as %25",
    );
    refused("keyfile=S3CRET%ff", "the query parameter keyfile is not UTF-8 once it is percent-decoded");
    for pair in [
        "cacertfile=S3CRET",
        "certfile=",
        "keyfile",
        "server_name_indication=x",
        "verify=verify_peer",
        "verify=verify_none",
    ] {
        let key = pair.split('=').next().unwrap();
        assert_refused(&[(
            &format!("amqp://user:S3CRET@host?{pair}"),
            &format!("the query parameter {key} needs TLS: an amqps:// URL"),
        )]);
    }
}

#[test]
fn an_address_prints_without_its_password() {
    for (url, printed) in [
        ("amqp://", "amqp://guest@localhost:5672/%2F"),
        ("amqps://u:S3CRET@h/v", "amqps://u@h:5671/v"),
        ("amqp://u:S3CRET@[::1]", "amqp://u@[::1]:5672/%2F"),
        ("amqp://u:S3CRET@[fe80::1%25eth0]", "amqp://u@[fe80::1%25eth0]:5672/%2F"),
        ("amqp://:S3CRET@h:1/a%20b%0a", "amqp://@h:1/a%20b%0A"),
        ("amqp://%40%0a:S3CRET@h%00/%C3%A9", "amqp://%40%0A@h%00:5672/%C3%A9"),
        ("amqps://u:S3CRET@h?keyfile=x", "amqps://u@h:5671/%2F"),
    ] {
        let address = Address::parse(url).unwrap();
        assert_eq!(address.to_string(), printed);
        assert_no_secret(&address);
        assert_eq!(format!("{:?}", address.password), "***");
        assert!(format!("{address:?}").contains("password: ***"));
    }
    assert_eq!(Secret("S3CRET".to_owned()).expose(), "S3CRET");
}

fn escape(text: &str, every_byte: bool) -> String {
    if every_byte { text.bytes().map(|byte| format!("%{byte:02x}")).collect() } else { encode(text).to_string() }
}

/// `any::<String>()` has no control characters. 63 characters fit a virtual host.
fn text(characters: RangeInclusive<usize>) -> impl Strategy<Value = String> {
    vec(any::<char>(), characters).prop_map(String::from_iter)
}

/// A host as a URL has it, and decoded.
fn any_host() -> impl Strategy<Value = (String, String)> {
    let name = (text(1..=63), any::<bool>()).prop_map(|(name, every_byte)| (escape(&name, every_byte), name));
    let zone = option::of("[a-z0-9.]{1,9}");
    let ipv6 = (any::<Ipv6Addr>(), zone).prop_map(|(ip, zone)| match zone {
        Some(zone) => (format!("[{ip}%25{zone}]"), format!("{ip}%{zone}")),
        None => (format!("[{ip}]"), ip.to_string()),
    });
    prop_oneof![3 => name, 1 => ipv6]
}

fn scraps() -> impl Strategy<Value = String> {
    let usual = select(vec![
        "/",
        "?",
        "@",
        ":",
        "[",
        "]",
        "%2f",
        "%00",
        "%0a",
        "%25",
        "&",
        "=",
        ",",
        "+",
        "-",
        ".",
        "\\",
        "'",
        "é",
        "0",
        "1",
        "5672",
        "65536",
        "::1",
        "[::1]",
        "host",
        "heartbeat=5",
        "keyfile=",
        "frame_max=",
        "auth_mechanism=",
        "verify=",
        "password=",
    ]);
    let odd = select(vec![
        "amqp://", "AMQPS://", ",amqp://", "//", "#", "%", "%2", "%ff", " ", "\n", "\r\n", "\0", "\u{feff}",
    ]);
    let scrap = prop_oneof![
        16 => usual.prop_map(str::to_owned),
        2 => odd.prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    vec(scrap, 0..6).prop_map(|scraps| scraps.concat())
}

/// A password that isn't encoded. Wherever it is cut, each piece contains the secret.
fn raw_password() -> impl Strategy<Value = String> {
    let piece = scraps().prop_map(|scraps| scraps + "S3CRET");
    vec(piece, 0..3).prop_map(|pieces| format!("S3CRET{}", pieces.concat()))
}

fn check_shown<T: fmt::Debug + fmt::Display>(shown: &T) -> Result<(), TestCaseError> {
    for text in [shown.to_string(), format!("{shown:?}")] {
        prop_assert!(!text.contains(char::is_control), "{text:?}");
        prop_assert!(!text.contains("S3CRET"), "{text}");
    }
    Ok(())
}

fn check_all_shown(result: Result<Vec<Address>, AddressError>) -> Result<(), TestCaseError> {
    match result {
        Ok(addresses) => addresses.iter().try_for_each(check_shown),
        Err(error) => check_shown(&error),
    }
}

proptest! {
    #[test]
    fn every_part_survives_encoding(
        tls in any::<bool>(),
        username in text(0..=63),
        password in option::of(text(0..=63)),
        (host_text, host) in any_host(),
        port in option::of(1..=u16::MAX),
        virtual_host in text(1..=63),
        every_byte in any::<bool>(),
        (heartbeat, file) in (option::of(any::<u16>()), option::of(text(0..=63))),
    ) {
        let file = file.filter(|file| tls && !file.is_empty());
        let mut url = if tls { "amqps://" } else { "amqp://" }.to_owned();
        url += &escape(&username, every_byte);
        if let Some(password) = &password {
            url += &format!(":{}", escape(password, every_byte));
        }
        url += &format!("@{host_text}");
        if let Some(port) = port {
            url += &format!(":{port}");
        }
        url += &format!("/{}?", escape(&virtual_host, every_byte));
        if let Some(seconds) = heartbeat {
            url += &format!("heartbeat={seconds}&");
        }
        if let Some(file) = &file {
            url += &format!("cacertfile={}", escape(file, every_byte));
        }

        let address = Address::parse(&url).unwrap();
        prop_assert_eq!(address.tls, tls);
        prop_assert_eq!(&address.username, &username);
        prop_assert_eq!(address.password_given, password.is_some());
        prop_assert_eq!(address.password.expose(), password.as_deref().unwrap_or("guest"));
        prop_assert_eq!(&address.host, &host);
        prop_assert_eq!(address.port, port.unwrap_or(if tls { 5671 } else { 5672 }));
        prop_assert_eq!(&address.virtual_host, &virtual_host);
        prop_assert_eq!(address.parameters.heartbeat, heartbeat);
        prop_assert_eq!(&address.parameters.cacertfile, &file.map(PathBuf::from));

        let printed = Address::parse(&address.to_string()).unwrap();
        let expected = Address {
            password: defaults().password,
            password_given: false,
            parameters: Parameters::default(),
            ..address.clone()
        };
        prop_assert_eq!(printed, expected);

        let list = parse_list(&format!("{url},{url}\n")).unwrap();
        prop_assert_eq!(list, vec![address.clone(), address]);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in prop_oneof![text(0..=63), scraps()]) {
        check_all_shown(parse_list(&text))?;
        check_all_shown(parse_list(&format!("amqps://{text}")))?;
    }

    #[test]
    fn no_piece_of_a_raw_password_is_shown(
        scheme in select(vec!["amqp://", "amqps://", "amqps://", "http://", ""]),
        user in scraps(),
        password in raw_password(),
        rest in scraps(),
    ) {
        let parse = |url: String| Address::parse(&url).map(|address| vec![address]);
        check_all_shown(parse(format!("{scheme}{user}:{password}@{rest}")))?;
        // Without an '@', the password stands where the port would.
        let (user, password) = (user.replace(['/', '?'], ""), password.replace('@', ""));
        check_all_shown(parse(format!("{scheme}{user}:{password}{rest}")))?;
    }

    #[test]
    fn no_piece_of_a_raw_password_in_a_list_is_shown(
        before in "(amqps?://[a-z]{1,3},){0,2}",
        user in scraps(),
        password in raw_password(),
        rest in scraps(),
    ) {
        // The list's separator can't be told from a password that looks like it.
        let mut userinfo = format!("{user}:{password}");
        if userinfo.to_lowercase().contains(",amqp") {
            userinfo = userinfo.replace(',', ";");
        }
        check_all_shown(parse_list(&format!("{before}amqp://{userinfo}@{rest}")))?;
    }
}
