//! TLS with the tools of others, in both directions, with certificates that are made as `docs/user/tls.md` says.

use crate::server::{Server, TAP_IMG, TAPDISK, tool};
use crate::{Add, Done};
use libtest_mimic::Failed;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub(crate) fn tests(add: Add) {
    let tools = &["openssl", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy"];
    add("tls::tools_of_others_reach_our_server".into(), tools, Box::new(server));
    add("tls::we_reach_qemu_nbd".into(), &["openssl", "qemu-nbd"], Box::new(client));
    add("tls::our_client_reaches_our_server".into(), &["openssl"], Box::new(ourselves));
    add("tls::a_peer_that_is_not_trusted_is_refused".into(), &["openssl", "nbdinfo"], Box::new(strangers));
    add("tls::certificates_that_cannot_be_used_are_named".into(), &["openssl"], Box::new(unusable));
    add("tls::bytes_that_are_no_handshake_cost_one_connection".into(), &["openssl"], Box::new(garbage));
}

const DOCUMENT: &str = include_str!("../../../../docs/user/tls.md");

/// A folder with certificates in `pki`, and a disk.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self, Failed> {
        let place = Self { folder: tempfile::tempdir()? };
        place.run(0)?;
        let bytes: Vec<u8> = (0..8 << 20).map(|i: u32| (i / 509) as u8).collect();
        std::fs::write(place.path("disk"), bytes)?;
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Carries out the commands of the document's section about certificates: its block `nth`.
    fn run(&self, nth: usize) -> Done {
        let section = DOCUMENT
            .split("\n## ")
            .find(|section| section.starts_with("Certificates"))
            .ok_or("no section")?;
        let lines: Vec<&str> = section.lines().collect();
        let blocks: Vec<String> = lines
            .chunk_by(|a, b| a.starts_with("    ") == b.starts_with("    "))
            .filter(|block| block[0].starts_with("    "))
            .map(|block| block.join("\n"))
            .collect();
        let shell = ["-e", "-c", blocks.get(nth).ok_or("no such block")?];
        let output = Command::new("sh").args(shell).current_dir(self.folder.path()).output()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn serve(&self, args: &[&str]) -> Result<Server, Failed> {
        let spec = format!("raw:{}", self.text("disk"));
        Server::start(&self.path("socket"), &[&["--tls-creds", &self.text("pki"), &*spec], args].concat())
    }

    /// The address of the server's unix socket for our client and libnbd.
    fn uri(&self, socket: &str, pki: &str) -> String {
        format!("nbds+unix:///?socket={}&tls-certificates={}", self.text(socket), self.text(pki))
    }

    /// A folder that has only the authority.
    fn anonymous(&self) -> Done {
        std::fs::create_dir(self.path("anonymous"))?;
        std::fs::copy(self.path("pki/ca-cert.pem"), self.path("anonymous/ca-cert.pem"))?;
        Ok(())
    }
}

fn server() -> Done {
    let place = Place::new()?;
    let server = place.serve(&[])?;
    let uri = place.uri("socket", "pki");
    assert!(tool("nbdinfo", &[&uri])?.contains("with TLS"), "it is secure");
    tool("nbdcopy", &["--connections=4", &uri, &place.text("copy")])?;
    assert!(std::fs::read(place.path("copy"))? == std::fs::read(place.path("disk"))?);
    let creds = format!("tls-creds-x509,id=t,dir={},endpoint=client", place.text("pki"));
    let opts = format!("driver=nbd,path={},tls-creds=t,tls-hostname=localhost", place.text("socket"));
    let script = ["-c", "write -P 7 5 3M", "-c", "read -P 7 5 3M", "-c", "flush"];
    tool("qemu-io", &[&["--object", &*creds, "--image-opts", &*opts], &script[..]].concat())?;
    tool(
        "qemu-img",
        &["convert", "--object", &creds, "--image-opts", &opts, "-O", "raw", &place.text("other")],
    )?;
    assert!(std::fs::read(place.path("other"))? == std::fs::read(place.path("disk"))?);
    assert_eq!(std::fs::read(place.path("disk"))?[5..][..3 << 20], vec![7; 3 << 20]);
    assert!(server.stop()?.success());
    Ok(())
}

fn client() -> Done {
    let place = Place::new()?;
    place.anonymous()?;
    let creds = format!("tls-creds-x509,id=t,dir={},endpoint=server,verify-peer=on", place.text("pki"));
    let socket = place.text("theirs");
    let args =
        ["--persistent", "--tls-creds=t", "-fraw", "--object", &creds, "-k", &socket, &place.text("disk")];
    let mut server = Command::new("qemu-nbd").args(args).spawn()?;
    while !place.path("theirs").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let copied = tool(TAP_IMG, &["convert", "-q", &place.uri("theirs", "pki"), &place.text("copy")]);
    let plain = tool(TAP_IMG, &["info", &format!("nbd:unix:{socket}")]);
    let unknown = tool(TAP_IMG, &["info", &place.uri("theirs", "anonymous")]);
    let _ = server.kill();
    server.wait()?;
    copied?;
    assert!(std::fs::read(place.path("copy"))? == std::fs::read(place.path("disk"))?);
    let said = plain.err().and_then(|failed| failed.message().map(str::to_owned)).unwrap_or_default();
    assert!(said.contains("it requires TLS: use nbds instead of nbd"), "{said}");
    assert!(unknown.is_err(), "it has no certificate");
    Ok(())
}

/// A disk of a server with TLS, served without: writes go through both.
fn ourselves() -> Done {
    let place = Place::new()?;
    let before = std::fs::read(place.path("disk"))?;
    let first = place.serve(&[])?;
    let second = Server::start(&place.path("second"), &[&place.uri("socket", "pki")])?;
    let mut client = crate::client::Client::connect(second.socket())?;
    assert_eq!(client.ask(crate::client::WRITE, 4096, &[9; 1 << 20])?, 0);
    assert_eq!(client.read(0, 4096)?, before[..4096]);
    drop(client);
    assert!(second.stop()?.success() && first.stop()?.success());
    let after = std::fs::read(place.path("disk"))?;
    assert!(
        after[4096..][..1 << 20] == vec![9; 1 << 20]
            && after[4096 + (1 << 20)..] == before[4096 + (1 << 20)..]
    );
    Ok(())
}

fn strangers() -> Done {
    let place = Place::new()?;
    place.anonymous()?;
    let refused = |uri: &str| -> Result<String, Failed> {
        let failed = tool(TAP_IMG, &["info", uri]).err().ok_or("it was let in")?;
        Ok(failed.message().unwrap_or_default().to_owned())
    };
    let server = place.serve(&[])?;
    assert!(tool("nbdinfo", &[&server.uri()]).is_err(), "without TLS");
    assert!(tool("nbdinfo", &[&place.uri("socket", "anonymous")]).is_err(), "without a certificate");
    for (uri, why) in [
        (format!("nbd:unix:{}", place.text("socket")), "it requires TLS"),
        (place.uri("socket", "anonymous"), "it wants a certificate of ours"),
        (format!("{}&tls-hostname=other", place.uri("socket", "pki")), "its certificate is for another name"),
    ] {
        let said = refused(&uri)?;
        assert!(said.contains(why), "{said}");
    }
    assert!(server.stop()?.success());
    let open = place.serve(&["--tls-verify-peer", "no"])?;
    tool("nbdinfo", &[&place.uri("socket", "anonymous")])?;
    tool(TAP_IMG, &["info", &place.uri("socket", "anonymous")])?;
    assert!(open.stop()?.success());
    let plain = Server::start(&place.path("socket"), &[&format!("raw:{}", place.text("disk"))])?;
    let said = refused(&place.uri("socket", "pki"))?;
    assert!(said.contains("it offers no TLS"), "{said}");
    assert!(plain.stop()?.success());
    place.run(1)?;
    let server = place.serve(&[])?;
    let said = refused(&place.uri("socket", "pki"))?;
    assert!(said.contains("it says that our certificate has expired or was revoked"), "{said}");
    assert!(server.stop()?.success());
    Ok(())
}

fn unusable() -> Done {
    let place = Place::new()?;
    let (disk, socket) = (format!("raw:{}", place.text("disk")), format!("unix:{}", place.text("s")));
    let serve = |pki: &str| -> Result<String, Failed> {
        let args = ["serve", "--nbd", &socket, "--tls-creds", &place.text(pki), &disk];
        let output = Command::new(TAPDISK).args(args).stdin(Stdio::null()).output()?;
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
        assert!(!place.path("s").exists(), "nothing is served");
        Ok(String::from_utf8(output.stderr)?)
    };
    assert!(serve("gone")?.ends_with("/gone: ca-cert.pem: no such file or directory (ENOENT)\n"));
    std::fs::copy(place.path("ca-key.pem"), place.path("pki/server-key.pem"))?;
    assert!(serve("pki")?.starts_with("tapdisk: failed to use the certificates in "));
    std::fs::write(place.path("pki/server-cert.pem"), "nothing")?;
    assert!(serve("pki")?.ends_with("/pki: server-cert.pem: it has no certificate\n"));
    std::fs::write(place.path("pki/server-cert.pem"), vec![b'-'; (1 << 20) + 1])?;
    assert!(serve("pki")?.contains("server-cert.pem: file too large"));
    std::fs::remove_file(place.path("pki/client-key.pem"))?;
    let failed = tool(TAP_IMG, &["info", &place.uri("s", "pki")]).err().ok_or("it was let in")?;
    let said = failed.message().unwrap_or_default();
    assert!(said.contains("client-key.pem: no such file or directory"), "{said}");
    Ok(())
}

fn garbage() -> Done {
    let place = Place::new()?;
    let server = place.serve(&[])?;
    for n in 0..40_u32 {
        let mut stream = UnixStream::connect(server.socket())?;
        // The client's flags, and STARTTLS.
        let mut bytes = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &5_u32.to_be_bytes(), &[0; 4]].concat();
        stream.write_all(&bytes)?;
        let mut answer = [0; 38];
        stream.read_exact(&mut answer)?;
        assert_eq!(answer[30..34], 1_u32.to_be_bytes(), "acknowledged");
        // A record of a handshake, or something like it.
        bytes = (0..200 + n * 500).map(|i| (i * 31 + n * 77) as u8).collect();
        bytes[..5].copy_from_slice(&[22, 3, (n % 5) as u8, (n * 3) as u8, 255]);
        // The server may close while we write.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.len() < 100, "{} bytes of answer to garbage", rest.len());
    }
    tool(TAP_IMG, &["info", &place.uri("socket", "pki")])?;
    assert!(server.stop()?.success());
    Ok(())
}
