//! `Tls`: the certificate and the key of the port, read from files and read again without ending connections. The only
//! user of rustls.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A certificate and its key. Copies share them.
#[derive(Clone)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

/// Shows no key.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads a chain of certificates, the server's first, and its key, both in PEM.
    ///
    /// # Errors
    /// Files that cannot be read, that have none in them, or that do not belong together.
    pub fn read(certificate: &Path, key: &Path) -> Result<Tls, String> {
        let config = Arc::new(RwLock::new(configuration(certificate, key)?));
        Ok(Tls { certificate: certificate.to_path_buf(), key: key.to_path_buf(), config })
    }

    /// Reads the files again, for the connections that follow. If that fails, the old ones stay.
    ///
    /// # Errors
    /// As [`Tls::read`].
    pub fn reload(&self) -> Result<(), String> {
        let config = configuration(&self.certificate, &self.key)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// What takes a connection now.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone().into()
    }
}

fn configuration(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
    let read = |path: &Path| std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let no_pem = |path: &Path, what: &str, error: &dyn fmt::Display| {
        format!("{}: expected {what} in PEM, found none that can be read ({error})", path.display())
    };
    let chain: Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(&read(certificate)?).collect();
    let chain = chain.map_err(|error| no_pem(certificate, "certificates", &error))?;
    if chain.is_empty() {
        return Err(format!("{}: expected certificates in PEM, found none", certificate.display()));
    }
    let secret = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| no_pem(key, "a private key", &error))?;
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret));
    let mut config = config.map_err(|error| format!("{} and {}: {error}", certificate.display(), key.display()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
