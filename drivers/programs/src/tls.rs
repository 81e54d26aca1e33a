//! Certificates for TLS, from a folder as QEMU's `tls-creds-x509` has it.
//!
//! ```text
//!   ca-cert.pem                       whose certificates are trusted
//!   ca-crl.pem                        which of them were revoked (optional)
//!   server-cert.pem, server-key.pem   of a server
//!   client-cert.pem, client-key.pem   of a client (optional)
//! ```
//!
//! They are read once, when the program starts, or opens a disk.

use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use std::fmt::Display;
use std::sync::Arc;
use tap_host::Errno;
use tap_images::{ImageHost, read_small};

/// Most bytes of one file.
const FILE_BYTES_MAX: usize = 1 << 20;

/// A folder of certificates.
struct Folder<'a, H> {
    host: &'a H,
    path: &'a str,
}

impl<H: ImageHost> Folder<'_, H> {
    fn failed(&self, name: &str, why: impl Display) -> String {
        format!("read the certificates in {}: {name}: {why}", self.path)
    }

    /// The content of a file, if it is there.
    async fn optional(&self, name: &str) -> Result<Option<Vec<u8>>, String> {
        let path = format!("{}/{name}", self.path);
        read_small(self.host, &path, FILE_BYTES_MAX).await.map_err(|error| self.failed(name, error))
    }

    async fn file(&self, name: &str) -> Result<Vec<u8>, String> {
        self.optional(name).await?.ok_or_else(|| self.failed(name, Errno::ENOENT))
    }

    /// The objects of one kind in a PEM file, at least one.
    fn objects<T: PemObject>(&self, name: &str, pem: &[u8], what: &str) -> Result<Vec<T>, String> {
        let objects = T::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let objects = objects.map_err(|error| self.failed(name, error))?;
        if objects.is_empty() { Err(self.failed(name, format!("it has no {what}"))) } else { Ok(objects) }
    }

    /// Whose certificates are trusted.
    async fn roots(&self) -> Result<Arc<RootCertStore>, String> {
        const NAME: &str = "ca-cert.pem";
        let mut roots = RootCertStore::empty();
        for certificate in self.objects(NAME, &self.file(NAME).await?, "certificate")? {
            roots.add(certificate).map_err(|error| self.failed(NAME, error))?;
        }
        Ok(Arc::new(roots))
    }

    async fn revoked(&self) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
        const NAME: &str = "ca-crl.pem";
        match self.optional(NAME).await? {
            Some(pem) => self.objects(NAME, &pem, "list of revoked certificates"),
            None => Ok(Vec::new()),
        }
    }

    /// The certificates and the key of a `role`; `None` if it has neither.
    async fn own(
        &self,
        role: &str,
    ) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, String> {
        let [cert, key] = ["cert", "key"].map(|what| format!("{role}-{what}.pem"));
        let pems = (self.optional(&cert).await?, self.optional(&key).await?);
        let (cert_pem, key_pem) = match pems {
            (Some(cert), Some(key)) => (cert, key),
            (None, None) => return Ok(None),
            (None, _) => return Err(self.failed(&cert, Errno::ENOENT)),
            (_, None) => return Err(self.failed(&key, Errno::ENOENT)),
        };
        let chain = self.objects(&cert, &cert_pem, "certificate")?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|error| self.failed(&key, error))?;
        Ok(Some((chain, key)))
    }
}

/// What secures connections. AES-GCM of TLS 1.2 ends a session after 2^24 records: the other kind comes first.
fn provider() -> Arc<CryptoProvider> {
    let lasting = [
        CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ];
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.tls13().is_none() && !lasting.contains(&suite.suite()));
    Arc::new(provider)
}

/// How a server with the certificates in `folder` secures connections. With `verify_peer` a client needs a certificate
/// that is trusted there.
///
/// # Errors
/// Text that continues "failed to".
pub(crate) async fn of_server<H: ImageHost>(
    host: &H,
    folder: &str,
    verify_peer: bool,
) -> Result<Arc<ServerConfig>, String> {
    let folder = Folder { host, path: folder };
    let unfit = |error: &dyn Display| format!("use the certificates in {}: {error}", folder.path);
    let config = ServerConfig::builder_with_provider(provider());
    let config = config.with_safe_default_protocol_versions().map_err(|error| unfit(&error))?;
    let config = if verify_peer {
        let verifier = WebPkiClientVerifier::builder_with_provider(folder.roots().await?, provider());
        // As GnuTLS: an authority without a list has revoked nothing.
        let verifier = verifier
            .with_crls(folder.revoked().await?)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration();
        config.with_client_cert_verifier(verifier.build().map_err(|error| unfit(&error))?)
    } else {
        config.with_no_client_auth()
    };
    let own = folder.own("server").await?;
    let (chain, key) = own.ok_or_else(|| folder.failed("server-cert.pem", Errno::ENOENT))?;
    let mut config = config.with_single_cert(chain, key).map_err(|error| unfit(&error))?;
    // Connections are few and long. What is kept for the next one would be memory that no budget counts.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.ignore_client_order = true;
    Ok(Arc::new(config))
}

/// How a client that trusts the authority in `folder` secures connections.
///
/// # Errors
/// Text that continues "failed to".
pub(crate) async fn of_client<H: ImageHost>(host: &H, folder: &str) -> Result<Arc<ClientConfig>, String> {
    let folder = Folder { host, path: folder };
    let unfit = |error: &dyn Display| format!("use the certificates in {}: {error}", folder.path);
    let config = ClientConfig::builder_with_provider(provider());
    let config = config.with_safe_default_protocol_versions().map_err(|error| unfit(&error))?;
    let verifier = WebPkiServerVerifier::builder_with_provider(folder.roots().await?, provider());
    let verifier = verifier
        .with_crls(folder.revoked().await?)
        .allow_unknown_revocation_status()
        .enforce_revocation_expiration();
    let config = config.with_webpki_verifier(verifier.build().map_err(|error| unfit(&error))?);
    let mut config = match folder.own("client").await? {
        Some((chain, key)) => config.with_client_auth_cert(chain, key).map_err(|error| unfit(&error))?,
        None => config.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests;
