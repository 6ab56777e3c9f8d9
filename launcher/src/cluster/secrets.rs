//! What keeps strangers out: a token and a certificate for each run, in files of their owner alone.

use rank_protocol::RunDir;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// The name that the certificate is for; agents know the coordinator by its certificate alone.
const NAME: &str = "phalanx-coordinator";
/// The name that the certificate of all doors is for.
const DOORS: &str = "phalanx-door";
/// Bytes of a token; twice as many hexadecimal digits.
const TOKEN_BYTES: usize = 32;

/// What a coordinator shows and asks for.
pub struct Secrets {
    /// For its listener.
    pub tls: Arc<ServerConfig>,
    /// What agents must show.
    pub token: String,
}

fn invalid(error: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidData, error.to_string())
}

/// Makes a token and a certificate for a run and writes what agents need into its folder. Those of
/// an earlier coordinator are of no use any more.
pub fn make(run: &RunDir) -> Result<Secrets> {
    std::fs::create_dir_all(run.cluster())?;
    let token = new_token()?;
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()]).map_err(invalid)?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(invalid)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(invalid)?
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .map_err(invalid)?;
    write_private(&run.certificate(), made.cert.pem().as_bytes())?;
    write_private(&run.token(), token.as_bytes())?;
    make_doors(run)?;
    Ok(Secrets { tls: Arc::new(tls), token })
}

/// Makes the certificate and the key of the doors at which agents reach each other, unless an
/// earlier coordinator has: agents outlive it.
fn make_doors(run: &RunDir) -> Result<()> {
    if run.doors().is_file() {
        return Ok(());
    }
    let made = rcgen::generate_simple_self_signed([DOORS.to_owned()]).map_err(invalid)?;
    let pem = format!("{}{}", made.cert.pem(), made.signing_key.serialize_pem());
    write_private(&run.doors(), pem.as_bytes())
}

/// What an agent shows at its door. All doors of a run have one certificate; what opens each is its
/// own key.
///
/// # Errors
/// Where the coordinator has made none yet.
pub fn door(run: &RunDir) -> Result<Arc<ServerConfig>> {
    let pem = std::fs::read(run.doors())?;
    let certificate = CertificateDer::from_pem_slice(&pem).map_err(invalid)?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(invalid)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(invalid)?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .map_err(invalid)?;
    Ok(Arc::new(tls))
}

/// What an agent trusts at other agents' doors, and the name to ask for.
///
/// # Errors
/// As [`door`].
pub fn doors(run: &RunDir) -> Result<(Arc<ClientConfig>, ServerName<'static>)> {
    let certificate = CertificateDer::from_pem_file(run.doors()).map_err(invalid)?;
    Ok((trusting(certificate)?, ServerName::try_from(DOORS).map_err(invalid)?))
}

/// What an agent trusts, the name to ask for, and the token to show.
pub fn read(run: &RunDir) -> Result<(Arc<ClientConfig>, ServerName<'static>, String)> {
    let token = std::fs::read_to_string(run.token())?.trim().to_owned();
    let certificate = CertificateDer::from_pem_file(run.certificate()).map_err(invalid)?;
    Ok((trusting(certificate)?, ServerName::try_from(NAME).map_err(invalid)?, token))
}

/// Trusts one certificate and no other.
fn trusting(certificate: CertificateDer<'static>) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).map_err(invalid)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(invalid)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(tls))
}

/// A new secret, in hexadecimal.
///
/// # Errors
/// Where the system gives no random bytes.
pub fn new_token() -> Result<String> {
    let mut bytes = [0; TOKEN_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether two tokens are equal, in a time that does not tell how far they are.
pub fn is_token(found: &str, expected: &str) -> bool {
    let differences = found.bytes().zip(expected.bytes()).fold(0, |all, (a, b)| all | (a ^ b));
    found.len() == expected.len() && differences == 0
}

/// Writes a file that its owner alone can read, whole or not at all.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    let _ = std::fs::remove_file(&temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_must_be_whole() {
        let token = new_token().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(token.len(), 2 * TOKEN_BYTES);
        assert!(is_token(&token, &token));
        assert!(!is_token(&token[1..], &token));
        assert!(!is_token("", &token));
        assert!(!is_token(&"0".repeat(2 * TOKEN_BYTES), &token));
    }
}
