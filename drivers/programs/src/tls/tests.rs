//! Certificates from folders of a simulated host, and handshakes in memory.

use super::{of_client, of_server};
use kernel_model::faults::FaultPlan;
use kernel_model::{Kernel, Storage, StorageConfig};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, KeyIdMethod,
    KeyPair, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS12;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig,
    ServerConnection, SupportedCipherSuite,
};
use sim::{Config, Sim};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// Number of the client's certificate.
const CLIENT: u64 = 7;

/// A machine with the folders `/server` and `/client`, whose certificates are all of one authority.
struct Place {
    sim: Sim,
    kernel: Kernel,
    authority: CertifiedIssuer<'static, KeyPair>,
}

/// PEM of `der`.
fn pem(kind: &str, der: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let four = |three: &[u8]| -> Vec<u8> {
        let byte = |i: usize| u32::from(three.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        let digit =
            |i: usize| if i > three.len() { b'=' } else { DIGITS[(bits >> (18 - 6 * i) & 63) as usize] };
        (0..4).map(digit).collect()
    };
    let text: Vec<u8> = der.chunks(3).flat_map(four).collect();
    let lines: Vec<_> = text.chunks(64).map(String::from_utf8_lossy).collect();
    format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"))
}

/// A certificate with its key.
fn sign(
    authority: &CertifiedIssuer<'static, KeyPair>,
    name: &str,
    number: u64,
) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.serial_number = Some(SerialNumber::from(number));
    let certificate = params.signed_by(&key, authority).unwrap();
    (vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
}

impl Place {
    fn new() -> Self {
        let sim = Sim::new(&Config::new(1));
        let config = StorageConfig { faults: FaultPlan::default(), ..StorageConfig::default() };
        let kernel = Kernel::new(&sim, &Storage::new(&sim, config));
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let place = Self { sim, kernel, authority };
        for (role, number) in [("server", 5), ("client", CLIENT)] {
            place.put(role, "ca-cert", "CERTIFICATE", place.authority.der());
            let (chain, key) = sign(&place.authority, role, number);
            place.put(role, &format!("{role}-cert"), "CERTIFICATE", &chain[0]);
            place.put(role, &format!("{role}-key"), "PRIVATE KEY", key.secret_der());
        }
        place
    }

    fn put(&self, folder: &str, name: &str, kind: &str, der: &[u8]) {
        self.kernel.storage().put_bytes(&format!("/{folder}/{name}.pem"), pem(kind, der).as_bytes());
    }

    /// Puts a list of revoked certificates into `folder`, which is to be replaced by another in the given year.
    fn put_revoked(&self, folder: &str, until: i32, numbers: &[u64]) {
        let revoked = |number: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*number),
            revocation_time: date_time_ymd(2001, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: numbers.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.authority).unwrap();
        self.put(folder, "ca-crl", "X509 CRL", list.der());
    }

    /// What the server's and the client's folder say.
    fn configs(&self) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let (host, read) = (self.kernel.process("program", 1), Rc::new(RefCell::new(None)));
        let to = Rc::clone(&read);
        self.sim
            .run(async move {
                let server = of_server(&host, "/server", true).await.unwrap();
                *to.borrow_mut() = Some((server, of_client(&host, "/client").await.unwrap()));
            })
            .unwrap();
        read.take().expect("it ends")
    }

    /// A handshake between both.
    fn meet(&self) -> Result<(), rustls::Error> {
        let (server, client) = self.configs();
        handshake(server, client).map(|_| ())
    }
}

/// Passes on what one side sends.
fn pass(from: &mut Connection, to: &mut Connection) -> Result<(), rustls::Error> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets()?;
    }
    Ok(())
}

/// The cipher that both sides agree on, or the first error.
fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> Result<SupportedCipherSuite, rustls::Error> {
    let mut server = Connection::from(ServerConnection::new(server)?);
    let mut client = Connection::from(ClientConnection::new(client, "server".try_into().unwrap())?);
    while server.is_handshaking() || client.is_handshaking() {
        pass(&mut client, &mut server)?;
        pass(&mut server, &mut client)?;
    }
    Ok(client.negotiated_cipher_suite().expect("after the handshake"))
}

/// Whoever can hold back a new list of revoked certificates would let in those that it names.
#[test]
fn an_outdated_list_of_revoked_certificates_is_not_relied_on() {
    for folder in ["server", "client"] {
        let place = Place::new();
        assert_eq!(place.meet(), Ok(()), "without a list");
        place.put_revoked(folder, 2100, &[CLIENT + 100]);
        assert_eq!(place.meet(), Ok(()), "with one that is valid");
        place.put_revoked(folder, 2002, &[CLIENT + 100]);
        let refused = place.meet().unwrap_err();
        let outdated = matches!(
            &refused,
            rustls::Error::InvalidCertificate(
                CertificateError::ExpiredRevocationList
                    | CertificateError::ExpiredRevocationListContext { .. }
            )
        );
        assert!(outdated, "{folder}: {refused:?}");
    }
    let place = Place::new();
    place.put_revoked("server", 2100, &[CLIENT]);
    let revoked = rustls::Error::InvalidCertificate(CertificateError::Revoked);
    assert_eq!(place.meet(), Err(revoked));
}

/// Peers that speak TLS 1.2 only, with the ciphers in the usual order.
fn others(authority: &CertifiedIssuer<'static, KeyPair>) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der().clone()).unwrap();
    let provider = || Arc::new(ring::default_provider());
    let (chain, key) = sign(authority, "server", 8);
    let server = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS12]).unwrap();
    let server = server.with_no_client_auth().with_single_cert(chain, key).unwrap();
    let (chain, key) = sign(authority, "client", 9);
    let client = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS12]).unwrap();
    let client = client.with_root_certificates(roots).with_client_auth_cert(chain, key).unwrap();
    (Arc::new(server), Arc::new(client))
}

/// A session of TLS 1.2 cannot replace its keys: it ends when they are used up.
#[test]
fn a_session_with_others_has_keys_that_last() {
    let place = Place::new();
    let (server, client) = place.configs();
    let (other_server, other_client) = others(&place.authority);
    // How many records may be sent with one key, where it is not replaced.
    let records_max = |server: &Arc<ServerConfig>, client: &Arc<ClientConfig>| match handshake(
        Arc::clone(server),
        Arc::clone(client),
    )
    .unwrap()
    {
        SupportedCipherSuite::Tls12(suite) => Some(suite.common.confidentiality_limit),
        SupportedCipherSuite::Tls13(_) => None,
    };
    assert_eq!(records_max(&other_server, &other_client), Some(1 << 24), "without one of ours");
    assert_eq!(records_max(&server, &other_client), Some(u64::MAX));
    assert_eq!(records_max(&other_server, &client), Some(u64::MAX));
    assert_eq!(records_max(&server, &client), None, "two of ours replace their keys");
}
