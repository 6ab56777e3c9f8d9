//! `restart.store`: where a coordinator keeps what its successor needs.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Most servers that may be named.
const MAX_ENDPOINTS: usize = 16;

/// Where a coordinator keeps what its successor needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartStore {
    /// The run's folder.
    File,
    /// etcd, under keys of the run.
    Etcd(EtcdAddress),
}

/// Where etcd is, and where in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EtcdAddress {
    /// Whether it is reached over TLS (`etcds://`).
    pub tls: bool,
    /// Its servers, each `HOST:PORT`; asked in turn.
    pub endpoints: Vec<String>,
    /// What all keys begin with, without `/` at its ends; a run's are under `PREFIX/NAME/`.
    pub prefix: String,
}

impl RestartStore {
    /// Reads `file`, `etcd://HOST:PORT[,HOST:PORT…]/PREFIX` or the same with `etcds`.
    ///
    /// # Errors
    /// What is wrong, and what to do about it, where something can be said.
    pub fn parse(text: &str) -> Result<Self, (String, Option<&'static str>)> {
        if text == "file" {
            return Ok(Self::File);
        }
        let (tls, rest) = match (text.strip_prefix("etcd://"), text.strip_prefix("etcds://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(("it is no store".to_owned(), None)),
        };
        let (servers, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if servers.contains('@') {
            let hint = "a name and password come from the environment: PHALANX_ETCD_USER and \
                        PHALANX_ETCD_PASSWORD or PHALANX_ETCD_PASSWORD_FILE";
            return Err(("it holds a name or a password".to_owned(), Some(hint)));
        }
        let endpoints: Vec<String> = servers.split(',').map(str::to_owned).collect();
        if let Some(bad) = endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
            return Err((format!("{bad:?} is no HOST:PORT"), None));
        }
        if endpoints.len() > MAX_ENDPOINTS {
            let count = endpoints.len();
            return Err((format!("it names {count} servers, the limit is {MAX_ENDPOINTS}"), None));
        }
        let prefix = prefix.trim_end_matches('/');
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if prefix.is_empty() || prefix.len() > 200 || !prefix.chars().all(is_plain) {
            let hint = "as in etcd://HOST:2379/phalanx";
            let what = "its prefix is not 1 to 200 letters, digits, `.`, `_`, `-` and `/`";
            return Err((what.to_owned(), Some(hint)));
        }
        Ok(Self::Etcd(EtcdAddress { tls, endpoints, prefix: prefix.to_owned() }))
    }
}

/// A host name, an IPv4 address or an IPv6 address in brackets, and a port.
fn is_endpoint(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = |host: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let inside = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match inside {
            Some(inside) => inside.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.chars().all(plain),
        }
    };
    is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl fmt::Display for RestartStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestartStore::File => write!(f, "file"),
            RestartStore::Etcd(address) => write!(f, "{address}"),
        }
    }
}

impl fmt::Display for EtcdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "etcds" } else { "etcd" };
        write!(f, "{scheme}://{}/{}", self.endpoints.join(","), self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_refused(text: &str, expected: &str) {
        let (message, hint) = RestartStore::parse(text).unwrap_err();
        let told = format!("{message} {}", hint.unwrap_or_default());
        assert!(told.contains(expected), "{text}: {told}");
    }

    #[test]
    fn a_store_reads_back_as_it_was_written() {
        for text in ["file", "etcd://a:2379/p", "etcds://a-1.b:2379,[::1]:80,10.0.0.1:1/p/q.r"] {
            assert_eq!(RestartStore::parse(text).unwrap().to_string(), text);
        }
        let store = RestartStore::parse("etcd://a:2379/p//").unwrap();
        assert_eq!(store.to_string(), "etcd://a:2379/p");
    }

    #[test]
    fn what_is_no_store_is_refused() {
        check_refused("", "no store");
        check_refused("http://a:2379/p", "no store");
        check_refused("etcd://a/p", "\"a\" is no HOST:PORT");
        check_refused("etcd://a:2379,/p", "\"\" is no HOST:PORT");
        check_refused("etcd://a:0/p", "no HOST:PORT");
        check_refused("etcd://a:2379", "prefix");
        check_refused("etcd://a:2379/p q", "prefix");
        check_refused("etcd://me:secret@a:2379/p", "PHALANX_ETCD_PASSWORD_FILE");
        check_refused(&format!("etcd://{}/p", ["a:1"; 17].join(",")), "17 servers");
    }
}
