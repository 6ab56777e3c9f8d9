//! Requests to etcd's JSON gateway: one server after the other, each within a time limit.

use super::Away;
use crate::error::UserError;
use rank_protocol::env;
use run_config::EtcdAddress;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig, TlsProvider};

/// Longest time that one server may take to answer.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(1500);
/// Longest time for a connection to one.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// Longest time that all of them may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The most bytes of an answer; etcd's own limit of a value is 1.5 MiB.
const MAX_ANSWER_BYTES: u64 = 4 << 20;
/// Characters of an answer that is no JSON, in a message.
const MAX_SHOWN: usize = 200;

/// A client of one etcd.
pub struct Http {
    agent: ureq::Agent,
    bases: Vec<String>,
    /// The server that answered last.
    current: usize,
    /// Name and password.
    login: Option<(String, String)>,
    token: Option<String>,
}

/// Why a server did not do what it was asked.
enum Failure {
    /// Another may.
    Unreachable(String),
    /// It wants to know who asks.
    Unknown,
    /// It refused.
    Refused(String),
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Name and password, of the environment and a file that it may name.
fn login() -> Result<Option<(String, String)>, UserError> {
    let Some(user) = variable(env::ETCD_USER) else { return Ok(None) };
    let password = match (variable(env::ETCD_PASSWORD), variable(env::ETCD_PASSWORD_FILE)) {
        (Some(password), None) => password,
        (None, Some(path)) => std::fs::read_to_string(&path)
            .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
            .map_err(|error| {
                UserError::usage(format!("{}: {path}: {error}", env::ETCD_PASSWORD_FILE))
            })?,
        (found, _) => {
            let which = if found.is_some() { "both" } else { "neither" };
            let (one, other) = (env::ETCD_PASSWORD, env::ETCD_PASSWORD_FILE);
            let message = format!("{} is set, and {which} of {one} and {other}", env::ETCD_USER);
            return Err(UserError::usage(message).hint("set one of the two"));
        }
    };
    Ok(Some((user, password)))
}

fn certificates(name: &str, path: &str) -> Result<Vec<Certificate<'static>>, UserError> {
    let wrong =
        |error: &dyn std::fmt::Display| UserError::usage(format!("{name}: {path}: {error}"));
    let read: Result<Vec<CertificateDer>, _> =
        CertificateDer::pem_file_iter(Path::new(path)).map_err(|error| wrong(&error))?.collect();
    let found = read.map_err(|error| wrong(&error))?;
    if found.is_empty() {
        return Err(wrong(&"no certificate is in it"));
    }
    Ok(found.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect())
}

/// Whom to trust, and what to show.
fn tls() -> Result<TlsConfig, UserError> {
    let Some(authorities) = variable(env::ETCD_CA) else {
        let message = format!("restart.store is etcds://…, and {} is not set", env::ETCD_CA);
        return Err(UserError::usage(message).hint("the PEM file of its certificate's authority"));
    };
    let roots = certificates(env::ETCD_CA, &authorities)?;
    let client = match (variable(env::ETCD_CERT), variable(env::ETCD_KEY)) {
        (None, None) => None,
        (Some(chain), Some(key)) => {
            let chain = certificates(env::ETCD_CERT, &chain)?;
            let wrong = |error: &dyn std::fmt::Display| {
                UserError::usage(format!("{}: {key}: {error}", env::ETCD_KEY))
            };
            let pem = std::fs::read(&key).map_err(|error| wrong(&error))?;
            let key = PrivateKey::from_pem(&pem).map_err(|error| wrong(&error))?;
            Some(ClientCert::new_with_certs(&chain, key))
        }
        _ => {
            let message = format!("one of {} and {} is not set", env::ETCD_CERT, env::ETCD_KEY);
            return Err(UserError::usage(message));
        }
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(RootCerts::from(roots))
        .client_cert(client)
        .build())
}

impl Http {
    /// Does not connect yet.
    ///
    /// # Errors
    /// What is wrong in the environment.
    pub fn new(address: &EtcdAddress) -> Result<Self, UserError> {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // What the environment says of proxies is for the world outside.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(REQUEST_TIMEOUT));
        let config = match address.tls {
            true => config.tls_config(tls()?),
            false => config,
        };
        let scheme = if address.tls { "https" } else { "http" };
        let base = |endpoint: &String| format!("{scheme}://{endpoint}");
        Ok(Self {
            agent: config.build().into(),
            bases: address.endpoints.iter().map(base).collect(),
            current: 0,
            login: login()?,
            token: None,
        })
    }

    /// Asks one server after the other until one answers.
    ///
    /// # Errors
    /// Why none did what it was asked.
    pub fn post(&mut self, path: &str, body: &Value) -> Result<Value, Away> {
        let deadline = Instant::now() + TIMEOUT;
        let mut why = String::new();
        for _ in 0..self.bases.len() {
            match self.post_known(path, body) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Refused(reason)) => return Err(Away(reason)),
                Err(Failure::Unknown) => return Err(Away("etcd wants a name and password".into())),
                Err(Failure::Unreachable(reason)) => why = reason,
            }
            self.current = (self.current + 1) % self.bases.len().max(1);
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(Away(why))
    }

    /// Asks one server, which is told who asks where it wants to know.
    fn post_known(&mut self, path: &str, body: &Value) -> Result<Value, Failure> {
        match self.post_once(path, body) {
            Err(Failure::Unknown) => {}
            answered => return answered,
        }
        let Some((name, password)) = &self.login else { return Err(Failure::Unknown) };
        self.token = None;
        let login = json!({ "name": name, "password": password });
        let answer = self.post_once("/v3/auth/authenticate", &login)?;
        let token = answer.get("token").and_then(Value::as_str).map(str::to_owned);
        self.token = Some(token.ok_or_else(|| Failure::Refused("etcd gave no token".into()))?);
        self.post_once(path, body)
    }

    fn post_once(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let base = self.bases.get(self.current).cloned().unwrap_or_default();
        let unreachable = |error: ureq::Error| Failure::Unreachable(format!("{base}: {error}"));
        let mut request =
            self.agent.post(format!("{base}{path}")).header("Content-Type", "application/json");
        if let Some(token) = &self.token {
            request = request.header("Authorization", token);
        }
        let mut response = request.send(body.to_string()).map_err(unreachable)?;
        let is_good = response.status().is_success();
        let answer = response.body_mut().with_config().limit(MAX_ANSWER_BYTES);
        let text = answer.read_to_string().map_err(unreachable)?;
        let answer: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        let refusal = answer.get("error");
        if is_good && refusal.is_none() && answer.is_object() {
            return Ok(answer);
        }
        let told = answer.get("message").or(refusal).and_then(Value::as_str);
        let told = told.or_else(|| refusal?.get("message")?.as_str());
        let shown: String = text.chars().take(MAX_SHOWN).collect();
        Err(failure(told.unwrap_or(&shown), &base))
    }
}

/// What a server's words mean: those that wait for a leader, say, may be right again soon.
fn failure(told: &str, base: &str) -> Failure {
    let reason = format!("{base}: {told}");
    let wants_to_know = ["invalid auth token", "user name is empty", "auth: token"];
    match wants_to_know.iter().any(|words| told.contains(words)) {
        true => Failure::Unknown,
        false if told.contains("permission denied") || told.contains("authentication failed") => {
            Failure::Refused(reason)
        }
        false => Failure::Unreachable(reason),
    }
}
