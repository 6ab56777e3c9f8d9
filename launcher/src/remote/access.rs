//! From a URL to an object store: credentials out of the environment, requests that end, and errors
//! that say what may mend them.
//!
//! Requests that fail for the server's sake are tried again for a few seconds by the client itself;
//! what fails for longer is the caller's to try again. No request takes more than [`REQUEST_S`].

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::{BackoffConfig, ClientConfigKey, Error as StoreError, ObjectStore, RetryConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longest time of one request, in seconds.
pub const REQUEST_S: u64 = 20;
/// Time for which the client tries a request again by itself. With [`REQUEST_S`] it bounds the time
/// until a failure is known: 25 s.
const RETRY_FOR: Duration = Duration::from_secs(5);
/// Longest text of an error, in characters: servers answer with pages.
const MAX_WORDS: usize = 600;

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RemoteError {
    /// The object store refuses, or cannot be reached: later it may do it.
    Remote(String),
    /// What lies in the object store is damaged, or not what it should be.
    Damaged(String),
    /// This machine's files.
    Local(String),
    /// The folder is another run's.
    Foreign(String),
    /// The checkpoint is no longer here: an old one that was removed, or one whose step was done
    /// again.
    Gone(String),
}

impl std::fmt::Display for RemoteError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RemoteError::Remote(reason)
            | RemoteError::Damaged(reason)
            | RemoteError::Local(reason)
            | RemoteError::Foreign(reason)
            | RemoteError::Gone(reason) => f.write_str(reason),
        }
    }
}

/// An object store, and where in it a URL points.
#[derive(Debug)]
pub(super) struct Access {
    pub store: Arc<dyn ObjectStore>,
    /// The folder in the bucket; empty: all of it.
    pub prefix: String,
    /// Where it is a folder of this machine.
    pub folder: Option<PathBuf>,
}

impl Access {
    /// Reads the credentials from the environment; sends nothing. A folder of this machine is made
    /// where it is absent and `may_make` says so.
    pub fn open(url: &str, may_make: bool) -> Result<Access, RemoteError> {
        open(url, may_make).map_err(|error| failed(url, url, &error))
    }
}

fn open(url: &str, may_make: bool) -> Result<Access, StoreError> {
    // Two crates bring a TLS library's choice of cryptography; where one was made, it stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let timeout = format!("{REQUEST_S} seconds");
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(2),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: 10, retry_timeout: RETRY_FOR };
    let key = ClientConfigKey::Timeout;
    let store: Arc<dyn ObjectStore> = match scheme {
        "s3" => {
            let builder = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
            let builder = builder.with_config(AmazonS3ConfigKey::Client(key), timeout);
            Arc::new(builder.build()?)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
            let builder = builder.with_retry(retry);
            let builder = builder.with_config(GoogleConfigKey::Client(key), timeout);
            Arc::new(builder.build()?)
        }
        "az" => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket);
            let builder = builder.with_retry(retry);
            let builder = builder.with_config(AzureConfigKey::Client(key), timeout);
            Arc::new(builder.build()?)
        }
        _ => return open_folder(Path::new(rest), may_make),
    };
    Ok(Access { store, prefix: prefix.to_owned(), folder: None })
}

fn open_folder(folder: &Path, may_make: bool) -> Result<Access, StoreError> {
    let failed =
        |error: std::io::Error| StoreError::Generic { store: "file", source: error.into() };
    match may_make {
        true => std::fs::create_dir_all(folder).map_err(failed)?,
        // It may be a disk that is not mounted.
        false => drop(std::fs::read_dir(folder).map_err(failed)?),
    }
    let store = LocalFileSystem::new_with_prefix(folder)?;
    let store = Arc::new(store.with_automatic_cleanup(true).with_fsync(true));
    Ok(Access { store, prefix: String::new(), folder: Some(folder.to_path_buf()) })
}

/// The error of a request about `what` to the object store of `url`.
pub(super) fn failed(what: &str, url: &str, error: &StoreError) -> RemoteError {
    let words = words(error);
    let hint = hint(url, error, &words).map_or(String::new(), |hint| format!(" (hint: {hint})"));
    RemoteError::Remote(format!("{what}: {words}{hint}"))
}

/// The error and its causes on one line that a terminal can take.
fn words(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    printable(&text)
}

/// What came from elsewhere, on one line, without what a terminal would obey.
pub(super) fn printable(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut text: String = text.chars().filter(|c| !c.is_control()).collect();
    if let Some((end, _)) = text.char_indices().nth(MAX_WORDS) {
        text.truncate(end);
        text.push('…');
    }
    text
}

/// What a user may do about it.
fn hint(url: &str, error: &StoreError, words: &str) -> Option<String> {
    let scheme = url.split_once("://").map_or("", |(scheme, _)| scheme);
    let names = match scheme {
        "s3" => "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "gs" => "GOOGLE_APPLICATION_CREDENTIALS",
        "az" => "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        _ => return None,
    };
    let says = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    // Where the environment has no credentials, the machine's own are asked for.
    if says(&["169.254.169.254", "169.254.170.2", "metadata.google.internal", "Account must be"]) {
        return Some(format!("no credentials are in the environment: set {names}"));
    }
    if matches!(error, StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. }) {
        return Some(format!("do {names} belong to one who may read and write there?"));
    }
    let hint = match error {
        StoreError::NotFound { .. } => "make the bucket, or mend checkpoint.remote",
        _ if says(&["No CA certificates"]) => {
            "install ca-certificates, or name a file of certificates in SSL_CERT_FILE"
        }
        _ if says(&["UnknownIssuer", "invalid peer certificate"]) => {
            "a certificate that this machine does not know: name it in SSL_CERT_FILE"
        }
        _ if says(&["scheme is not allowed"]) => {
            "an address without TLS needs AWS_ALLOW_HTTP=true in the environment"
        }
        _ if says(&["without LOCATION", "AuthorizationHeaderMalformed", "301 Moved"]) => {
            "is AWS_REGION the bucket's?"
        }
        _ if says(&["501 Not Implemented", "NotImplemented"]) => {
            "a store without conditional requests needs AWS_CONDITIONAL_PUT=disabled"
        }
        _ if says(&["dns error", "Connect", "timed out"]) => {
            "is the address right, and can this machine reach it?"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Chain(&'static str, Option<Box<Chain>>);

    impl std::fmt::Display for Chain {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl std::error::Error for Chain {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_deref().map(|inner| inner as _)
        }
    }

    fn generic(outer: &'static str, inner: &'static str) -> StoreError {
        let source = Box::new(Chain(outer, Some(Box::new(Chain(inner, None)))));
        StoreError::Generic { store: "S3", source }
    }

    #[track_caller]
    fn check(url: &str, error: &StoreError, words: &[&str]) {
        let text = failed("here", url, error).to_string();
        for word in words {
            assert!(text.contains(word), "{word} is not in {text}");
        }
    }

    #[test]
    fn an_error_says_all_its_causes_once_and_a_hint() {
        let error = generic("error sending request", "tcp connect error: Connection refused");
        let words = ["here: ", "error sending request: tcp connect error: Connection refused"];
        check("s3://b", &error, &words);
        assert_eq!(super::words(&error).matches("error sending request").count(), 1);
        check("s3://b", &generic("HTTP", "dns error"), &["can this machine reach it"]);
        check("s3://b", &generic("x", "No CA certificates were loaded"), &["SSL_CERT_FILE"]);
        check("gs://b", &generic("GET http://metadata.google.internal/x", ""), &["GOOGLE_APPL"]);
        check("s3://b", &generic("PUT http://169.254.169.254/x", ""), &["AWS_ACCESS_KEY_ID"]);
        let source = || Box::new(Chain("403", None));
        let denied = StoreError::PermissionDenied { path: "x".into(), source: source() };
        check("az://b", &denied, &["AZURE_STORAGE_ACCOUNT_NAME", "may read and write"]);
        let absent = StoreError::NotFound { path: "x".into(), source: source() };
        check("s3://b", &absent, &["make the bucket"]);
    }

    #[test]
    fn what_a_server_says_is_cut_and_cannot_move_the_cursor() {
        assert_eq!(printable("a\n\t b\u{1b}[2Jc\u{7}"), "a b[2Jc");
        let long = printable(&"é".repeat(10_000));
        assert_eq!(long.chars().count(), MAX_WORDS + 1);
    }

    #[test]
    fn a_folder_that_is_not_there_is_made_for_writing_only() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("file://{}/a/b", folder.path().display());
        assert!(Access::open(&url, false).unwrap_err().to_string().contains("No such file"));
        Access::open(&url, true).unwrap();
        Access::open(&url, false).unwrap();
    }
}
