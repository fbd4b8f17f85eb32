//! The proxy as a process, with the kernel's redirection before it and real servers behind it: curl in the guest's place, everything in network
//! namespaces of the test's own. Needs root, `ip`, `nft` and `curl`.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test ends at the first surprise")]

mod measure;
mod world;

use std::os::unix::process::ExitStatusExt as _;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use libtest_mimic::{Arguments, Trial};
use stasis_egress::control::types::{
    Mode, Policy, RefusalKind, RefusedCode, ReplacePolicy, SandboxRef, Secret, Transform,
};
use world::{HOST, KEY, METADATA, OTHER, PRIVATE, PUBLIC, World, ask, roots};

/// What must not be seen by the guest.
const SECRET: &str = "Bearer s3cret-value";
/// What a child of this program is to try; see [`confinement`].
const TRY: &str = "STASIS_EGRESS_TEST_TRY";

fn main() {
    if let Ok(what) = std::env::var(TRY) {
        return confined_child(&what);
    }
    let lacking = lacking();
    let arguments = Arguments::from_args();
    if let Some(why) = lacking.as_ref().filter(|_| !arguments.list) {
        eprintln!("left out: the proxy in network namespaces: {why}");
    }
    let test = |name: &str, run: fn() -> std::pin::Pin<Box<dyn Future<Output = ()>>>| {
        let run = move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            runtime.block_on(async { tokio::time::timeout(Duration::from_mins(5), run()).await })?;
            runtime.shutdown_timeout(Duration::from_secs(5));
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(lacking.is_some())
    };
    let mut trials = vec![
        test("names_and_addresses", || Box::pin(names_and_addresses())),
        test("questions", || Box::pin(questions())),
        test("requests_are_changed", || Box::pin(requests_are_changed())),
        test("instructions", || Box::pin(instructions())),
        Trial::test("confinement", || {
            confinement();
            Ok(())
        }),
    ];
    if std::env::var_os(measure::VARIABLE).is_some() && lacking.is_none() {
        trials.push(test("throughput", || Box::pin(measure::throughput())));
    }
    libtest_mimic::run(&arguments, trials).exit();
}

/// What the machine lacks for namespaces.
fn lacking() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    let there = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        folders.any(|folder| folder.join(program).exists())
    };
    ["ip", "nft", "curl"].into_iter().find(|program| !there(program)).map(|program| format!("needs {program}"))
}

fn custom(domains: &[&str], cidrs: &[&str]) -> Policy {
    let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
    Policy { mode: Mode::Custom, allow_domains: owned(domains), allow_cidrs: owned(cidrs), transforms: Vec::new() }
}

async fn names_and_addresses() {
    let world = World::new().await;
    let names = ["a.example.com", "private.example.com", "metadata.example.com", "host.example.com"];
    world.put(1, custom(&names, &["93.184.216.99/32"])).await;
    let ca = format!("--cacert {}", roots(&world).display());
    let last = async || world.client.sandbox(KEY).await.unwrap().refusals.last().map(|r| r.kind);

    for scheme in ["http", "https"] {
        let (status, said) = world.curl(&format!("{ca} {scheme}://a.example.com/")).await;
        assert!(status == 0 && said.contains(&format!("this is {PUBLIC}")), "{scheme}: {status} {said}");
    }
    // Another name at the address of an allowed one, over TLS and without.
    let began = Instant::now();
    let (status, said) =
        world.curl(&format!("{ca} --resolve evil.example.org:443:{PUBLIC} https://evil.example.org/")).await;
    assert!(status == 35 && said.contains("access denied"), "{status} {said}");
    assert_eq!(last().await, Some(RefusalKind::NameNotAllowed));
    let (status, said) = world.curl(&format!("--resolve evil.example.org:80:{PUBLIC} http://evil.example.org/")).await;
    assert!(status == 0 && said.contains("no rule allows evil.example.org"), "{status} {said}");
    // An allowed name at an address of the guest's choice: the proxy resolves it itself.
    let (status, said) =
        world.curl(&format!("{ca} --resolve a.example.com:443:{METADATA} https://a.example.com/")).await;
    assert!(status == 0 && said.contains(&format!("this is {PUBLIC}")), "{status} {said}");
    // Addresses: an allowed range, and everything else.
    let (status, said) = world.curl(&format!("http://{OTHER}/")).await;
    assert!(status == 0 && said.contains(&format!("this is {OTHER}")), "{status} {said}");
    for address in [PUBLIC, PRIVATE, METADATA, HOST] {
        let (status, said) = world.curl(&format!("http://{address}/")).await;
        assert!(status == 0 && said.contains("only names can be allowed"), "{address}: {status} {said}");
        let (status, said) = world.curl(&format!("-k https://{address}/")).await;
        assert!(status == 35 && said.contains("unrecognized name"), "{address}: {status} {said}");
    }
    // Allowed names that lead inside.
    for (name, address) in [("private", PRIVATE), ("metadata", METADATA), ("host", HOST)] {
        let (status, said) =
            world.curl(&format!("--resolve {name}.example.com:80:{PUBLIC} http://{name}.example.com/")).await;
        assert!(status == 0 && said.contains(&format!("leads to {address}")), "{name}: {status} {said}");
        assert_eq!(last().await, Some(RefusalKind::AddressNotPublic));
    }
    // HTTP/2 by prior knowledge, and a later request on a kept connection.
    let (status, said) = world.curl("--http2-prior-knowledge http://a.example.com/").await;
    assert!(status != 0 && !said.contains("this is"), "{status} {said}");
    assert!(began.elapsed() < Duration::from_mins(1), "refusals are quick");
    let report = world.client.sandbox(KEY).await.unwrap();
    assert_eq!(report.rules["cidr 93.184.216.99/32"].allowed, 1);
    assert!(report.rules["domain a.example.com"].allowed >= 3 && report.bytes_down > 0);
    // The proxy's own port is no way around.
    let (status, _) = world.curl("-m 3 http://10.0.2.1:3128/").await;
    assert!(status != 0);
}

async fn questions() {
    let world = World::new().await;
    world.put(1, custom(&["a.example.com", "*.example.org", "private.example.com"], &[])).await;
    assert_eq!(ask(&world, "A.example.com.", RecordType::A).await, (ResponseCode::NoError, vec![PUBLIC]));
    for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        assert_eq!(ask(&world, "a.example.com.", kind).await, (ResponseCode::NoError, vec![]));
    }
    for kind in [RecordType::TXT, RecordType::NULL, RecordType::MX, RecordType::ANY, RecordType::CNAME] {
        assert_eq!(ask(&world, "a.example.com.", kind).await.0, ResponseCode::Refused);
    }
    assert_eq!(ask(&world, "b.example.com.", RecordType::A).await.0, ResponseCode::NXDomain);
    assert_eq!(ask(&world, "private.example.com.", RecordType::A).await, (ResponseCode::Refused, vec![]));
    let (status, said) = world.curl("http://b.example.com/").await;
    assert!(status == 6, "{status} {said}");
    // A tunnel: names that carry data, then many of them.
    let long = format!("{}.{}.example.org.", "a".repeat(60), "b".repeat(60));
    assert_eq!(ask(&world, &long, RecordType::A).await.0, ResponseCode::Refused);
    let mut refused = 0;
    for i in 0..80 {
        refused +=
            u32::from(ask(&world, &format!("n{i}.example.org."), RecordType::A).await.0 == ResponseCode::Refused);
    }
    assert!((20..=80).contains(&refused), "{refused} of 80 names were refused");
    let report = world.client.sandbox(KEY).await.unwrap();
    assert!(report.refusals.iter().any(|r| r.kind == RefusalKind::TooManyNames));
    // A flood is answered, not queued.
    let replace = |mode| ReplacePolicy {
        key: KEY.to_owned(),
        generation: 2,
        policy: Policy { mode, ..custom(&[], &[]) },
        authority: None,
    };
    world.client.replace(replace(Mode::DenyAll)).await.unwrap();
    assert_eq!(ask(&world, "a.example.com.", RecordType::A).await.0, ResponseCode::Refused);
    world.client.replace(replace(Mode::AllowAll)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(ask(&world, "b.example.com.", RecordType::A).await, (ResponseCode::NoError, vec![PUBLIC]));
    assert_eq!(ask(&world, "b.example.com.", RecordType::AAAA).await, (ResponseCode::NoError, vec![]));
}

async fn requests_are_changed() {
    let world = World::new().await;
    let mut policy = custom(&["a.example.com"], &[]);
    policy.transforms = vec![Transform {
        domain: "api.example.com".to_owned(),
        inject_headers: [("authorization".to_owned(), Secret::new(SECRET.to_owned()))].into(),
        strip_headers: vec!["x-guest".to_owned()],
    }];
    world.put(1, policy).await;
    let ca = world.dir.path().join("sandbox.pem");
    std::fs::write(&ca, &world.authority.certificate_pem).unwrap();
    let (sandbox, public) = (format!("--cacert {}", ca.display()), format!("--cacert {}", roots(&world).display()));
    for target in [format!("{sandbox} https://api.example.com/"), "http://api.example.com/".to_owned()] {
        let (status, said) = world.curl(&format!("-H X-Guest:1 -H Authorization:mine {target}")).await;
        assert!(status == 0 && said.contains(SECRET), "{status} {said}");
        assert!(!said.contains("X-Guest") && !said.contains("mine"), "{said}");
    }
    // What has no transform is not ended: the real server's certificate arrives.
    let (status, said) = world.curl(&format!("{public} https://a.example.com/")).await;
    assert!(status == 0 && !said.contains("s3cret"), "{status} {said}");
    // A client that pins the real server.
    let began = Instant::now();
    let (status, said) = world.curl(&format!("{public} https://api.example.com/")).await;
    assert!(status == 60 && began.elapsed() < Duration::from_secs(5), "{status} {said}");
    let report = world.client.sandbox(KEY).await.unwrap();
    assert_eq!(report.refusals.last().map(|r| r.kind), Some(RefusalKind::ClientDistrust));
    assert!(!serde_json::to_string(&report).unwrap().contains("s3cret"));
}

async fn instructions() {
    let mut world = World::new().await;
    world.put(5, custom(&["a.example.com"], &[])).await;
    let status = world.client.status().await.unwrap();
    assert_eq!(status.sandboxes, [SandboxRef { key: KEY.to_owned(), generation: 5 }]);
    assert!(status.confined_by.contains(&"seccomp".to_owned()));
    let replace = |generation, domain: &str| ReplacePolicy {
        key: KEY.to_owned(),
        generation,
        policy: custom(&[domain], &[]),
        authority: None,
    };
    let stale = world.client.replace(replace(4, "evil.example.org")).await.unwrap_err();
    assert_eq!(stale.refused(), Some(RefusedCode::Stale));
    assert_eq!(world.curl("http://a.example.com/").await.0, 0);
    let invalid = world.client.replace(replace(5, "no name")).await.unwrap_err();
    assert_eq!(invalid.refused(), Some(RefusedCode::Invalid));
    assert_eq!(world.curl("-f http://a.example.com/").await.0, 0, "what was refused changed nothing");
    world.client.replace(replace(6, "b.example.com")).await.unwrap();
    assert_eq!(world.curl(&format!("-f --resolve a.example.com:80:{PUBLIC} http://a.example.com/")).await.0, 22);
    assert_eq!(world.curl("-f http://b.example.com/").await.0, 0);
    // The same sandbox again, as after a wake.
    let earlier = SandboxRef { key: KEY.to_owned(), generation: 5 };
    assert_eq!(world.client.remove(earlier).await.unwrap_err().refused(), Some(RefusedCode::Stale));
    let report = world.client.remove(SandboxRef { key: KEY.to_owned(), generation: 6 }).await.unwrap().unwrap();
    assert!(report.refused >= 1 && report.connections == 0);
    assert_eq!(world.curl("-m 3 http://b.example.com/").await.0, 6, "nobody answers questions any more");
    assert_eq!(world.client.remove(SandboxRef { key: KEY.to_owned(), generation: 7 }).await.unwrap(), None);
    world.put(7, custom(&["a.example.com"], &[])).await;
    assert_eq!(world.curl("-f http://a.example.com/").await.0, 0);
    let text = std::fs::read_to_string(format!("/proc/{}/status", status.pid)).unwrap();
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), ("2".to_owned(), "1".to_owned()));
    assert_eq!((field("CapEff:"), field("CapPrm:")), ("0".repeat(16), "0".repeat(16)));
    assert_eq!(world.proxy_id(), status.pid);
    world.client.shutdown().await.unwrap();
    assert!(world.ended().success());
}

/// Each of these kills the process that tries it, once it is confined.
fn confinement() {
    for what in ["open", "execute", "fork", "thread", "netlink", "unix", "raw", "ptrace", "mount", "nothing"] {
        #[expect(clippy::disallowed_methods, reason = "this program itself")]
        let child = std::process::Command::new(std::env::current_exe().unwrap()).env(TRY, what).status().unwrap();
        match what {
            "nothing" => assert!(child.success(), "{child}"),
            _ => assert_eq!(child.signal(), Some(31), "{what}: {child}"),
        }
    }
}

fn confined_child(what: &str) {
    stasis_egress::confine::limit().unwrap();
    stasis_egress::confine::filter_calls().unwrap();
    // SAFETY: these calls get no memory, or a text that lives long enough; the process ends at the first of them.
    unsafe {
        match what {
            "open" => drop(std::fs::File::open("/etc/hostname")),
            "execute" => {
                libc::execv(c"/bin/true".as_ptr(), std::ptr::null());
            }
            "fork" => {
                libc::fork();
            }
            "thread" => drop(std::thread::Builder::new().spawn(|| ())),
            "netlink" => {
                libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0);
            }
            "unix" => {
                libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
            }
            "raw" => {
                libc::socket(libc::AF_INET, libc::SOCK_RAW, 1);
            }
            "ptrace" => {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            }
            "mount" => {
                libc::umount(c"/".as_ptr());
            }
            _ => {}
        }
    }
}
