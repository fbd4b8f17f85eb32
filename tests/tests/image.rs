//! A container image of busybox alone becomes a template, and its guest what the image says: needs VT-x or AMD-V, or the rig.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use stasis_api::dev::layout::{Entry, Layout, Packing, archive};
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;

const BUSYBOX: &str = "/bin/busybox";

fn lacking() -> Option<String> {
    let images = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest()
        .or_else(|| host::missing(&images, "guest-images/linux/build makes it"))
        .or_else(|| host::missing(Path::new(BUSYBOX), "Debian's package busybox-static"))
}

fn main() {
    Suite::default().test("a_guest_is_what_its_image_says", lacking(), a_guest_is_what_its_image_says).main();
}

/// Nothing but busybox, an account, and a program that notes what it finds.
fn image() -> Result<Layout, Error> {
    let first = vec![
        Entry::directory("bin"),
        Entry::file("bin/busybox", std::fs::read(BUSYBOX)?).mode(0o755),
        Entry::symlink("bin/sh", "busybox"),
        Entry::directory("home/app").owner(1000, 1000),
        Entry::file("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
        Entry::file("etc/gone", "lower"),
    ];
    let mut second = vec![
        Entry::file("etc/.wh.gone", ""),
        Entry::directory("srv/app").owner(1000, 1000),
        Entry::file(
            "srv/app/start",
            "#!/bin/sh\necho \"$GREETING $WHO $(id -u) $PWD $1\" > ran.new\nmv ran.new ran\nexec sleep 100000\n",
        )
        .mode(0o755),
        Entry::file("bin/whoareyou", "#!/bin/sh\n").mode(0o4755),
    ];
    second.extend(
        ["id", "cat", "mv", "sleep", "stat", "test", "rm", "ps"]
            .map(|name| Entry::symlink(format!("bin/{name}"), "busybox")),
    );
    let config = json!({
        "User": "app", "WorkingDir": "/srv/app", "Env": ["PATH=/bin", "GREETING=hello", "WHO=image"],
        "Entrypoint": ["./start"], "Cmd": ["argument"], "ExposedPorts": {"3000/tcp": {}},
    });
    Ok(Layout::new(&config, &[(Packing::Gzip, archive(&first)), (Packing::Zstd, archive(&second))])?)
}

struct Guest {
    service: Service,
    id: String,
}

impl Guest {
    /// Standard output of a command that must succeed.
    async fn run(&self, command: &str) -> Result<String, Error> {
        let body = json!({"command": command, "timeout": 120});
        let path = format!("/v1/sandbox/{}/process/execute", self.id);
        let done = self.service.call("POST", &path, Some(body)).await?.expect(200)?;
        eprintln!("{command}: {}", done.json);
        if done.json["exit_code"] != json!(0) {
            return Err(format!("{command}: {:?}", done.json).into());
        }
        Ok(done.text("stdout").trim().to_owned())
    }

    /// What the image's program noted, once it has.
    async fn noted(&self) -> Result<String, Error> {
        for _ in 0..300 {
            if let Ok(text) = self.run("cat ran").await {
                return Ok(text);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err("the image's program noted nothing".into())
    }
}

async fn a_guest_is_what_its_image_says() -> Outcome {
    let local = host::scratch()?;
    let layout = image()?;
    layout.write(&local.path().join("app"), "v1")?;
    let local_dir = local.path().display().to_string();
    let options = Options {
        images: Some(host::built("images")),
        environment: [
            ("STASIS_DEADLINES_BOOT_MS", "300000"),
            ("STASIS_DEADLINES_WAKE_MS", "60000"),
            ("STASIS_TEMPLATES_LOCAL_DIR", local_dir.as_str()),
            ("STASIS_TEMPLATES_DISK_MIB", "256"),
            ("STASIS_TEMPLATES_IMAGE_MIB", "64"),
            // The second boot is of the template itself.
            ("STASIS_GOLDEN", "off"),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .to_vec(),
    };
    let service = Service::start(options).await?;
    let body = json!({"name": "app", "uri": "oci:app:v1"});
    let template = service.call("POST", "/v1/template", Some(body)).await?.expect(201)?;
    assert_eq!((template.text("digest"), &template.json["port"]), (layout.digest(), &json!(3000)));
    let body = json!({"template_name": "app", "memory": 512, "env_vars": {"WHO": "sandbox"}});
    let created = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?;
    eprintln!("created: {}", created.timing);
    assert_eq!((created.text("template_id"), &created.json["disk"]), (template.text("id"), &json!(256)));
    let guest = Guest { service, id: created.text("id") };

    assert_eq!(
        guest.run("echo \"$(id -u):$(id -g) $PWD $HOME $GREETING $WHO\"").await?,
        "1000:1000 /srv/app /home/app hello sandbox"
    );
    assert_eq!(guest.noted().await?, "hello sandbox 1000 /srv/app argument");
    assert_eq!(guest.run("test ! -e /etc/gone; stat -c '%a %u' /bin/whoareyou").await?, "4755 0");
    let system =
        guest.service.call("GET", &format!("/v1/sandbox/{}/system/workdir", guest.id), None).await?.expect(200)?;
    assert_eq!(system.text("workdir"), "/srv/app");
    let path = format!("/v1/template/{}", template.text("id"));
    guest.service.call("DELETE", &path, None).await?.expect(409)?;

    // Asleep and awake, its program goes on; stopped and started, it begins again.
    guest.run("rm ran").await?;
    guest.service.pause(&guest.id).await?.expect(201)?;
    assert_eq!(guest.run("pwd; test ! -e ran").await?, "/srv/app");
    for verb in ["stop", "start"] {
        let path = format!("/v1/sandbox/{}/{verb}", guest.id);
        guest.service.call("POST", &path, None).await?.expect(200)?;
    }
    assert_eq!(guest.noted().await?, "hello sandbox 1000 /srv/app argument");
    Ok(())
}
