use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
};

/// All addresses of `host`, at least one, in the order to try them in.
pub(super) async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    match literal(host, port) {
        Some(address) => Ok(vec![address?]),
        None => Ok(in_turn(look_up(host, port).await?)),
    }
}

/// Each address once, IPv6 and IPv4 in turn (RFC 8305, 4); otherwise in the resolver's order.
fn in_turn(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let mut turns: Vec<(usize, SocketAddr)> = Vec::new();
    for address in found {
        if turns.iter().all(|(_, other)| *other != address) {
            let turn = turns.iter().filter(|(_, other)| other.is_ipv6() == address.is_ipv6()).count();
            turns.push((turn, address));
        }
    }
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, address)| address).collect()
}

/// `None` if `host` is a name. IPv6 may have the zone of RFC 6874.
fn literal(host: &str, port: u16) -> Option<io::Result<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Some(Ok((ip, port).into()));
    }
    let (ip, zone) = host.split_once('%')?;
    let ip = ip.parse::<Ipv6Addr>().ok()?;
    let index = match zone.parse() {
        Ok(index) => Ok(index),
        Err(_) => nix::net::if_::if_nametoindex(zone).map_err(io::Error::from),
    };
    Some(index.map(|index| SocketAddrV6::new(ip, port, 0, index).into()))
}

#[cfg(not(target_env = "gnu"))]
async fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host((host, port)).await?.collect())
}

/// Doesn't call glibc's getaddrinfo(3): in a static program its name service switch crashes if the image's glibc is
/// newer and nsswitch.conf lists `myhostname` or `resolve` (seen with 2.36 in a 2.41 image).
#[cfg(target_env = "gnu")]
async fn look_up(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    use hickory_resolver::{TokioResolver, config::LookupIpStrategy, proto::rr::Name};
    // `from_ascii` takes any ASCII name as it is, as getaddrinfo(3) does: also one with an underscore, or `xn--a`.
    let name = Name::from_ascii(host).map_err(io::Error::other)?;
    let mut builder = TokioResolver::builder_tokio().map_err(io::Error::other)?;
    builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    let resolver = builder.build().map_err(io::Error::other)?;
    let found = resolver.lookup_ip(name).await.map_err(io::Error::other)?;
    Ok(found.iter().map(|ip| (ip, port).into()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_not_looked_up() {
        let found = |host| literal(host, 5672).map(|found| found.unwrap().to_string());
        assert_eq!(found("127.0.0.1"), Some("127.0.0.1:5672".into()));
        assert_eq!(found("::1"), Some("[::1]:5672".into()));
        assert_eq!(found("fe80::1%1"), Some("[fe80::1%1]:5672".into()));
        assert_eq!(found("fe80::1%lo"), Some("[fe80::1%1]:5672".into()));
        assert_eq!(found("localhost"), None);
        assert!(literal("fe80::1%nowhere", 5672).unwrap().is_err());
    }

    #[test]
    fn families_take_turns_beginning_with_the_resolvers_first() {
        let ordered = |found: &[&str]| {
            let found = found.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 5672));
            in_turn(found.collect()).iter().map(|address| address.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ordered(&["::1", "::2", "::3", "1.1.1.1", "2.2.2.2"]), ["::1", "1.1.1.1", "::2", "2.2.2.2", "::3"]);
        assert_eq!(ordered(&["1.1.1.1", "2.2.2.2", "::1"]), ["1.1.1.1", "::1", "2.2.2.2"]);
        assert_eq!(ordered(&["2.2.2.2", "1.1.1.1", "2.2.2.2"]), ["2.2.2.2", "1.1.1.1"]);
        assert!(ordered(&[]).is_empty());
    }
}
