//! A run's state in etcd (API version 3, by its JSON gateway): two keys under `PREFIX/NAME/`.
//!
//! `holder` hangs on the holder's lease and says who and where it is; its create revision, which
//! grows over the whole of etcd, is the epoch. `state` is what a successor must know. Every write
//! is a transaction that asks whether `holder` is still of the writer's epoch, so that one who has
//! lost its lease writes nothing. No token, key or certificate of the run is in etcd.

use super::http::Http;
use super::{Acquired, Away, Holder, Record, StateStore, TTL};
use crate::error::UserError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use run_config::EtcdAddress;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The most bytes of a record; etcd takes requests of at most 1.5 MiB.
const MAX_RECORD_BYTES: usize = 1 << 20;

/// One run's keys.
pub struct EtcdStore {
    http: Http,
    holder_key: String,
    state_key: String,
    lease: Option<String>,
    epoch: u64,
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64.encode(bytes)
}

/// etcd writes 64-bit numbers as strings, and leaves out zeros.
fn number(value: Option<&Value>) -> u64 {
    match value {
        Some(Value::String(text)) => text.parse().unwrap_or(0),
        Some(value) => value.as_u64().unwrap_or(0),
        None => 0,
    }
}

fn nonsense(what: &str) -> Away {
    Away(format!("etcd's answer is none: {what}"))
}

/// The first value of a range's answer.
fn value_of<T: DeserializeOwned>(range: Option<&Value>) -> Result<Option<T>, Away> {
    let Some(pair) = range.and_then(|range| range.get("kvs")?.get(0)) else { return Ok(None) };
    let text = pair.get("value").and_then(Value::as_str).unwrap_or_default();
    let bytes = BASE64.decode(text).map_err(|error| nonsense(&error.to_string()))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| nonsense(&error.to_string()))
}

/// A JSON value for etcd.
fn to_value(value: &impl Serialize) -> Result<String, Away> {
    let bytes = serde_json::to_vec(value).map_err(|error| Away(error.to_string()))?;
    if bytes.len() > MAX_RECORD_BYTES {
        let size = bytes.len();
        return Err(Away(format!("a record of {size} bytes is over {MAX_RECORD_BYTES}")));
    }
    Ok(encode(bytes))
}

impl EtcdStore {
    /// The keys of the run of this name. Does not connect yet.
    ///
    /// # Errors
    /// What is wrong in the environment.
    pub fn new(address: &EtcdAddress, name: &str) -> Result<Self, UserError> {
        let key = |what: &str| encode(format!("{}/{name}/{what}", address.prefix));
        Ok(Self {
            http: Http::new(address)?,
            holder_key: key("holder"),
            state_key: key("state"),
            lease: None,
            epoch: 0,
        })
    }

    /// Who holds the run, and its epoch. Any server answers what it knows, which may be old by a
    /// moment.
    ///
    /// # Errors
    /// [`Away`].
    pub fn holder(&mut self) -> Result<Option<(u64, Holder)>, Away> {
        let asked = json!({ "key": self.holder_key, "serializable": true });
        let range = self.http.post("/v3/kv/range", &asked)?;
        let Some(holder) = value_of(Some(&range))? else { return Ok(None) };
        let pair = range.get("kvs").and_then(|pairs| pairs.get(0));
        Ok(Some((number(pair.and_then(|pair| pair.get("create_revision"))), holder)))
    }

    fn grant(&mut self) -> Result<String, Away> {
        let ttl = TTL.as_secs().to_string();
        let granted = self.http.post("/v3/lease/grant", &json!({ "TTL": ttl, "ID": "0" }))?;
        let id = granted.get("ID").and_then(Value::as_str);
        id.map(str::to_owned).ok_or_else(|| nonsense("a lease without an ID"))
    }

    fn revoke(&mut self, lease: &str) {
        if let Err(away) = self.http.post("/v3/lease/revoke", &json!({ "ID": lease })) {
            tracing::debug!("a lease ends by itself: {away}");
        }
    }

    fn txn(&mut self, epoch: u64, success: &Value, failure: &Value) -> Result<Value, Away> {
        let compare = json!([{
            "result": "EQUAL", "target": "CREATE",
            "key": self.holder_key, "create_revision": epoch.to_string(),
        }]);
        let body = json!({ "compare": compare, "success": success, "failure": failure });
        self.http.post("/v3/kv/txn", &body)
    }

    /// Puts a value, in this epoch alone.
    fn put(&mut self, put: Value) -> Result<bool, Away> {
        if self.epoch == 0 {
            return Ok(false);
        }
        let done = self.txn(self.epoch, &json!([{ "request_put": put }]), &json!([]))?;
        Ok(succeeded(&done))
    }
}

fn succeeded(answer: &Value) -> bool {
    answer.get("succeeded").and_then(Value::as_bool) == Some(true)
}

fn range_of(answer: &Value, index: usize) -> Option<&Value> {
    answer.get("responses")?.get(index)?.get("response_range")
}

impl StateStore for EtcdStore {
    fn acquire(&mut self, holder: &Holder) -> Result<Acquired, Away> {
        self.release();
        let lease = self.grant()?;
        // Should the answer be lost, the lease ends what it may have brought about.
        self.lease = Some(lease.clone());
        let put = json!({ "key": self.holder_key, "value": to_value(holder)?, "lease": lease });
        let state = json!({ "request_range": { "key": self.state_key } });
        let other = json!({ "request_range": { "key": self.holder_key } });
        let done = self.txn(0, &json!([{ "request_put": put }, state]), &json!([other]))?;
        if !succeeded(&done) {
            self.release();
            let other = value_of(range_of(&done, 0))?;
            return other.map(Acquired::Held).ok_or_else(|| nonsense("a holder that is none"));
        }
        // A key's create revision is that of the transaction which made it.
        self.epoch = number(done.get("header").and_then(|header| header.get("revision")));
        if self.epoch == 0 {
            return Err(nonsense("a transaction without a revision"));
        }
        Ok(Acquired::Yes { epoch: self.epoch, record: value_of(range_of(&done, 1))? })
    }

    fn renew(&mut self) -> Result<bool, Away> {
        let Some(lease) = &self.lease else { return Ok(false) };
        let answer = self.http.post("/v3/lease/keepalive", &json!({ "ID": lease }))?;
        let result = answer.get("result").ok_or_else(|| nonsense("a renewal without a result"))?;
        Ok(number(result.get("TTL")) > 0)
    }

    fn write(&mut self, record: &Record) -> Result<bool, Away> {
        let value = to_value(record)?;
        self.put(json!({ "key": self.state_key, "value": value }))
    }

    fn announce(&mut self, holder: &Holder) -> Result<bool, Away> {
        let value = to_value(holder)?;
        self.put(json!({ "key": self.holder_key, "value": value, "ignore_lease": true }))
    }

    fn release(&mut self) {
        self.epoch = 0;
        if let Some(lease) = self.lease.take() {
            self.revoke(&lease);
        }
    }
}
