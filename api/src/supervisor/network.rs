//! Networks of sandboxes: claimed with a VM, given back when it ends, and told what the sandbox's policy is.
//!
//! Each VM has a network of its own, named after sandbox and process ([`owner`]), so that a wake never waits for what is left of the life
//! before it. Its rules are in place before the VMM gets its tap, the proxy knows the sandbox before, too, and the tap carries nothing until
//! the guest is about to run ([`Core::raise_network`]). A pause lowers it before the guest stands still, and a pause that fails raises it.
//!
//! Everything here fails closed: a network that cannot be given its policy is given back, and the operation fails.
//!
//! Secrets meet the policy here and nowhere else, on their way to the egress process ([`Core::egress_policy`]).

use super::Core;
use crate::config::{Config, Enabled};
use crate::egress_process::EgressProcess;
use crate::error::{Error, chain};
use crate::host;
use crate::ids::SandboxId;
use crate::launcher::Launcher;
use crate::metrics::NETWORK_SECONDS;
use crate::network_activity::Activity;
use crate::network_policy::{Injected, Mode, NetworkPolicy, Transform};
use crate::record::{Authority, Spec, VmmIdentity};
use crate::registry::Sandbox;
use crate::vmm_process::Vmm;
use crate::wire::network::NetworkActivity;
use stasis_agent::protocol::trust::TrustRequest;
use stasis_egress::config::name_servers;
use stasis_egress::control::types::{self as egress, Secret};
use stasis_vmm::control::types::{MacAddress, NetworkConfig, NetworkLimits};
use stasis_warden::client::ClientError;
use stasis_warden::network::policy::{Mode as RulesMode, Policy};
use stasis_warden::network::serve::{Reply, Request};
use stasis_warden::network::{GATEWAY, GUEST, GUEST_HARDWARE, MTU};
use stasis_warden::protocol;
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// The policy of a sandbox without one.
static OPEN: NetworkPolicy = NetworkPolicy::OPEN;
/// For the guest to write a certificate.
const TRUST: Duration = Duration::from_secs(20);
/// Between two looks at whether the egress process lives.
const LOOK: Duration = Duration::from_secs(2);

/// What makes networks on this host.
#[derive(Debug)]
pub struct Network {
    launcher: Arc<Launcher>,
    egress: EgressProcess,
    /// The last generation that the egress process was told: it takes no earlier ones.
    generation: AtomicU64,
}

/// Whether sandboxes get networks, and why not.
#[derive(Debug)]
pub enum Networking {
    /// They do.
    On(Arc<Network>),
    /// They do not.
    Off(String),
}

impl Networking {
    /// Opens networks as the configuration says. An error only when it says that there must be some.
    pub(super) async fn open(config: &Config, launcher: &Arc<Launcher>) -> Result<Self, Error> {
        let wanted = config.network.enabled;
        if wanted == Enabled::Off {
            return Ok(Self::Off("networks are off (network.enabled)".to_owned()));
        }
        // A warden of our own may be one of several on this host, which all would lay claim to its one table.
        if wanted == Enabled::Auto && config.isolation.warden.is_none() {
            let why = "they take the host's own warden (isolation.warden), or network.enabled = \"on\"";
            return Ok(Self::Off(why.to_owned()));
        }
        let opened = if launcher.warden().is_some() {
            Network::open(config, launcher.clone()).await
        } else {
            Err("this supervisor has no warden, which makes networks".to_owned())
        };
        match opened {
            Ok(network) => Ok(Self::On(Arc::new(network))),
            Err(why) if wanted == Enabled::On => {
                Err(Error::Host(format!("network.enabled is \"on\", and sandboxes can have no network: {why}")))
            }
            Err(why) => Ok(Self::Off(why)),
        }
    }

    /// For people, when there are none.
    pub fn caveat(&self) -> Option<String> {
        match self {
            Self::On(_) => None,
            Self::Off(why) => Some(format!("sandboxes have no network: {why}")),
        }
    }

    /// Whether sandboxes that are made now get a network.
    pub(super) fn is_on(&self) -> bool {
        matches!(self, Self::On(_))
    }

    fn network(&self) -> Option<&Arc<Network>> {
        match self {
            Self::On(network) => Some(network),
            Self::Off(_) => None,
        }
    }
}

impl Network {
    async fn open(config: &Config, launcher: Arc<Launcher>) -> Result<Self, String> {
        let program = host::beside("stasis-egress").map_err(|e| e.to_string())?;
        let mut upstreams = config.network.dns.clone();
        if upstreams.is_empty() {
            upstreams = name_servers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
        }
        let ranges = |flag: &'static str, ranges: &[stasis_warden::network::range::Range]| {
            ranges.iter().flat_map(move |range| [flag.to_owned(), range.to_string()]).collect::<Vec<_>>()
        };
        let mut arguments: Vec<String> = ranges("--permit", &config.network.allow);
        arguments.extend(ranges("--refuse", &config.network.deny));
        arguments.extend(upstreams.iter().flat_map(|upstream| ["--upstream".to_owned(), upstream.to_string()]));
        let authorities = config.network.authorities.iter();
        arguments.extend(authorities.flat_map(|file| ["--extra-roots".to_owned(), file.display().to_string()]));
        let egress = EgressProcess::new(&program, &config.data_dir, arguments);
        let network = Self { launcher, egress, generation: AtomicU64::new(0) };
        let open = Request::Open {
            addresses: config.network.addresses,
            ready: config.network.ready,
            operator: config.network.operator(),
        };
        network.ask(open).await.map_err(|e| chain(&e))?;
        network.egress.ensure().await.map_err(|e| format!("the egress process: {e}"))?;
        let status = network.egress.client.status().await.map_err(|e| chain(&e))?;
        let told = status.sandboxes.iter().map(|sandbox| sandbox.generation).max().unwrap_or(0);
        network.generation.store(told, Ordering::Relaxed);
        Ok(network)
    }

    /// A generation later than all before.
    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed) + 1
    }

    async fn ask(&self, request: Request) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let launcher = self.launcher.clone();
        let asked = tokio::task::spawn_blocking(move || match launcher.warden() {
            Some(warden) => warden.call(&protocol::Request::Network(request), &[]),
            None => Err(ClientError::Answer("there is no warden".to_owned())),
        });
        let asked = asked.await;
        match asked.map_err(|e| ClientError::Answer(e.to_string()))?? {
            (protocol::Reply::Network(reply), descriptors) => Ok((reply, descriptors)),
            (other, _) => Err(ClientError::Answer(format!("{other:?}"))),
        }
    }
}

/// The name of the network of a sandbox's VM.
fn owner(id: &SandboxId, vmm: &VmmIdentity) -> String {
    format!("{id}.{}.{}", vmm.pid, vmm.started_ticks)
}

/// What the warden needs to know of a policy.
fn rules(policy: &NetworkPolicy) -> Policy {
    Policy {
        mode: match policy.mode {
            Mode::AllowAll => RulesMode::AllowAll,
            Mode::DenyAll => RulesMode::DenyAll,
            Mode::Custom => RulesMode::Custom,
        },
        // Checked when the policy was given.
        allow: policy.allow_cidrs.iter().filter_map(|range| range.parse().ok()).collect(),
        proxy: policy.mode == Mode::Custom || !policy.transforms.is_empty(),
    }
}

/// The device that a guest's network is: the same for every guest, since each has a network of its own.
pub(super) fn device(limits: NetworkLimits) -> Option<NetworkConfig> {
    let mtu = u16::try_from(MTU).ok()?;
    let NetworkLimits { to_guest, from_guest } = limits;
    Some(NetworkConfig { mac: MacAddress::new(GUEST_HARDWARE)?, mtu, to_guest, from_guest })
}

/// What the guest's agent is told of it on the kernel's command line.
pub(super) fn on_command_line(cmdline: &str) -> String {
    format!("{cmdline} stasis.net={GUEST}/30,{GATEWAY},{GATEWAY},{MTU}")
}

impl Core {
    /// What a new sandbox needs to have of its own before it is recorded: the values of its policy's headers and a certificate authority are
    /// kept in the journal, and the record gets their names.
    pub(super) fn keep_secrets(&self, id: &SandboxId, spec: &mut Spec) -> Result<(), Error> {
        let Some(policy) = &mut spec.network_policy else { return Ok(()) };
        // From a snapshot: another sandbox's values.
        self.journal.share_secrets(id.as_str(), policy.secrets())?;
        policy.keep(|| self.commit_id().to_string(), |name, text| self.journal.keep_secret(id.as_str(), name, text))?;
        let transforms = !policy.transforms.is_empty() && spec.network;
        spec.authority = if transforms { Some(self.make_authority(id)?) } else { None };
        Ok(())
    }

    fn make_authority(&self, id: &SandboxId) -> Result<Authority, Error> {
        let made = stasis_egress::authority::make(&format!("Stasis egress of {id}"));
        let made = made.map_err(|source| Error::Network {
            id: id.clone(),
            action: "make its certificate authority",
            source: source.into(),
        })?;
        let key = self.commit_id().to_string();
        self.journal.keep_secret(id.as_str(), &key, made.key_pem.reveal())?;
        Ok(Authority { name: made.name, certificate_pem: made.certificate_pem, key })
    }

    fn network_error(sandbox: &Sandbox, action: &'static str) -> impl FnOnce(ClientError) -> Error {
        let id = sandbox.id.clone();
        move |source| Error::Network { id, action, source: source.into() }
    }

    /// A network for a VM of the sandbox, with its policy in place, and its tap, which is down. `None` where there are no networks, or the
    /// machine has no device for one.
    pub(super) async fn connect(&self, sandbox: &Sandbox, vm: &Vmm) -> Result<Option<File>, Error> {
        let spec = sandbox.record().spec;
        let Some(network) = self.network.network().filter(|_| spec.network) else { return Ok(None) };
        let policy = spec.network_policy.as_ref().unwrap_or(&OPEN);
        let owner = owner(&sandbox.id, vm.identity());
        let claim = Request::Claim { owner: owner.clone(), policy: rules(policy) };
        let begun = Instant::now();
        let (_, descriptors) = network.ask(claim).await.map_err(Self::network_error(sandbox, "make its network"))?;
        self.metrics.observe(NETWORK_SECONDS, &[("operation", "claim")], begun.elapsed());
        let Ok([tap, proxy, dns, dns_tcp]) = <[OwnedFd; 4]>::try_from(descriptors) else {
            return Err(Error::Bug("a network without its descriptors"));
        };
        let told = self.tell_egress(network, sandbox, policy, [proxy, dns, dns_tcp]).await;
        if let Err(error) = told {
            let released = network.ask(Request::Release { owner }).await;
            if let Err(left) = released {
                tracing::warn!(id = %sandbox.id, error = chain(&left), "a network is left");
            }
            return Err(error);
        }
        Ok(Some(tap.into()))
    }

    /// Nothing for deny-all, whose packets come nowhere near it.
    async fn tell_egress(
        &self,
        network: &Network,
        sandbox: &Sandbox,
        policy: &NetworkPolicy,
        [proxy, dns, dns_tcp]: [OwnedFd; 3],
    ) -> Result<(), Error> {
        if policy.mode == Mode::DenyAll {
            return Ok(());
        }
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Network {
            id: sandbox.id.clone(),
            action: "tell the egress process of it",
            source,
        };
        let generation = network.next_generation();
        sandbox.set_egress_generation(generation);
        let put = egress::PutSandbox {
            key: sandbox.id.to_string(),
            generation,
            policy: self.egress_policy(&sandbox.id, policy)?,
            authority: self.authority_of(sandbox, policy)?,
            sockets: egress::SocketKinds::default(),
        };
        let sockets =
            egress::Sockets { proxy: Some(proxy.into()), dns_udp: Some(dns.into()), dns_tcp: Some(dns_tcp.into()) };
        network.egress.client.put(put, &sockets).await.map_err(|e| failed(e.into()))
    }

    /// The policy with its secrets. A value that this host does not have is left out, and [`Core::network_activity`] says so.
    fn egress_policy(&self, id: &SandboxId, policy: &NetworkPolicy) -> Result<egress::Policy, Error> {
        let mut transforms = Vec::with_capacity(policy.transforms.len());
        for Transform { domain, inject_headers, strip_headers } in &policy.transforms {
            let mut values = std::collections::BTreeMap::new();
            for (header, value) in inject_headers {
                let text = match value {
                    Injected::Given(_) => None,
                    Injected::Kept { secret } => self.journal.secret(id.as_str(), secret)?,
                };
                if let Some(text) = text {
                    values.insert(header.clone(), Secret::new(text));
                } else {
                    tracing::warn!(%id, domain, header, "the value of a header is not on this host");
                }
            }
            let (domain, strip_headers) = (domain.clone(), strip_headers.clone());
            transforms.push(egress::Transform { domain, inject_headers: values, strip_headers });
        }
        Ok(egress::Policy {
            mode: match policy.mode {
                Mode::AllowAll => egress::Mode::AllowAll,
                Mode::DenyAll => egress::Mode::DenyAll,
                Mode::Custom => egress::Mode::Custom,
            },
            allow_domains: policy.allow_domains.clone(),
            allow_cidrs: policy.allow_cidrs.clone(),
            transforms,
        })
    }

    /// The authority of a sandbox whose policy has transforms; a new one when the key is on another host. The guest is told after the wake.
    fn authority_of(&self, sandbox: &Sandbox, policy: &NetworkPolicy) -> Result<Option<egress::Authority>, Error> {
        if policy.transforms.is_empty() {
            return Ok(None);
        }
        let id = &sandbox.id;
        let key_of = |authority: &Authority| self.journal.secret(id.as_str(), &authority.key);
        let mut authority = sandbox.record().spec.authority;
        let mut key = authority.as_ref().map(key_of).transpose()?.flatten();
        if key.is_none() {
            let made = self.make_authority(id)?;
            key = key_of(&made)?;
            self.registry.amend(sandbox, |record| record.spec.authority = Some(made.clone()))?;
            authority = Some(made);
        }
        Ok(authority.zip(key).map(|(authority, key)| egress::Authority {
            name: authority.name,
            certificate_pem: authority.certificate_pem,
            key_pem: Secret::new(key),
        }))
    }

    /// Has the guest trust the authority of its egress proxy, if it has one. A clone of a snapshot is told of none, too: it may still trust that
    /// of the sandbox that it comes from.
    pub(super) async fn tell_trust(&self, sandbox: &Sandbox, vm: &Vmm, is_clone: bool) -> Result<(), Error> {
        let spec = sandbox.record().spec;
        if !spec.agent || (spec.authority.is_none() && !is_clone) {
            return Ok(());
        }
        let request = TrustRequest { certificate_pem: spec.authority.map(|authority| authority.certificate_pem) };
        let told = self.agent(vm).trust(&request, TRUST).await;
        let told = told.map_err(|failure| Error::Agent {
            id: sandbox.id.clone(),
            action: "trust the authority of its egress proxy",
            what: failure.to_string(),
        })?;
        if !told.failed.is_empty() {
            tracing::warn!(id = %sandbox.id, failed = ?told.failed, "not all of the guest trusts its egress proxy");
        }
        Ok(())
    }

    /// Lets the sandbox's network carry packets: its guest is about to run.
    pub(super) async fn raise_network(&self, sandbox: &Sandbox, vm: &Vmm) -> Result<(), Error> {
        self.set_network(sandbox, vm, true).await.map_err(Self::network_error(sandbox, "bring its network up"))
    }

    /// Lets it carry none: its guest is about to stand still. One that goes on raises it again.
    pub(super) async fn lower_network(&self, sandbox: &Sandbox, vm: &Vmm) -> Result<(), Error> {
        self.set_network(sandbox, vm, false).await.map_err(Self::network_error(sandbox, "take its network down"))
    }

    async fn set_network(&self, sandbox: &Sandbox, vm: &Vmm, up: bool) -> Result<(), ClientError> {
        let Some(network) = self.network.network().filter(|_| sandbox.record().spec.network) else { return Ok(()) };
        let set = network.ask(Request::SetUp { owner: owner(&sandbox.id, vm.identity()), up }).await;
        match set {
            // A guest that began before this host made networks has none.
            Err(ClientError::Refused(refusal)) if refusal.code == protocol::RefusalCode::NotFound => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives the network of a VM back, in the background: it carries nothing any more, since its tap ended with the VMM.
    pub(super) fn disconnect(&self, sandbox: &Sandbox, vm: &Vmm) {
        let spec = sandbox.record().spec;
        // A guest that is nobody's sandbox has none.
        let listed = self.registry.get(&sandbox.id).filter(|_| spec.network);
        let (Some(network), Some(sandbox)) = (self.network.network().cloned(), listed) else { return };
        let (owner, generation) = (owner(&sandbox.id, vm.identity()), sandbox.egress_generation());
        let (now, metrics) = (self.sources.now_ms(), self.metrics.clone());
        tokio::spawn(async move {
            let mut life = Activity::default();
            if let Ok((Reply::Report(report), _)) = network.ask(Request::Report { owner: owner.clone() }).await {
                let policy = spec.network_policy.as_ref().unwrap_or(&OPEN);
                life.add_network(&report, policy, now);
            }
            let gone = egress::SandboxRef { key: sandbox.id.to_string(), generation };
            match network.egress.client.remove(gone).await {
                Ok(Some(last)) => life.add_egress(&last),
                Ok(None) => {}
                // The next wake was faster: its counters go on.
                Err(error) => tracing::debug!(id = %sandbox.id, error = chain(&error), "the egress process keeps it"),
            }
            metrics.network(&life.total());
            sandbox.network_past(|past| past.merge(&life));
            let begun = Instant::now();
            if let Err(error) = network.ask(Request::Release { owner }).await {
                tracing::warn!(id = %sandbox.id, error = chain(&error), "a network is left until the next start");
            }
            metrics.observe(NETWORK_SECONDS, &[("operation", "release")], begun.elapsed());
        });
    }

    /// What the network of this VM did so far.
    async fn counted(&self, network: &Network, sandbox: &Sandbox, vmm: &VmmIdentity) -> Activity {
        let spec = sandbox.record().spec;
        let policy = spec.network_policy.as_ref().unwrap_or(&OPEN);
        let mut activity = Activity::default();
        if let Ok((Reply::Report(report), _)) = network.ask(Request::Report { owner: owner(&sandbox.id, vmm) }).await {
            activity.add_network(&report, policy, self.sources.now_ms());
        }
        if let Ok(report) = network.egress.client.sandbox(sandbox.id.as_str()).await {
            activity.add_egress(&report);
        }
        activity
    }

    /// What the sandbox may reach, what it reached, and what it was refused.
    pub async fn network_activity(&self, sandbox: &Sandbox) -> Result<NetworkActivity, Error> {
        let spec = sandbox.record().spec;
        let policy = spec.network_policy.clone().unwrap_or(NetworkPolicy::OPEN);
        let mut activity = sandbox.network_past(|past| past.clone());
        let vm = sandbox.vm();
        let now = match (self.network.network().filter(|_| spec.network), &vm) {
            (Some(network), Some(vm)) => Some(self.counted(network, sandbox, vm.identity()).await),
            _ => None,
        };
        if let Some(now) = &now {
            activity.merge(now);
        }
        let reason = match (&now, &self.network) {
            (Some(_), _) => None,
            (None, Networking::Off(why)) => Some(why.clone()),
            (None, _) if !spec.network => Some("it was made without a network".to_owned()),
            (None, _) => Some(format!("it is {}", sandbox.state())),
        };
        let mut missing_values = Vec::new();
        for transform in &policy.transforms {
            for (header, value) in &transform.inject_headers {
                let kept = match value {
                    Injected::Given(_) => false,
                    Injected::Kept { secret } => self.journal.secret(sandbox.id.as_str(), secret)?.is_some(),
                };
                if !kept {
                    missing_values.push(format!("{}: {header}", transform.domain));
                }
            }
        }
        let total = activity.total();
        Ok(NetworkActivity {
            connected: now.is_some(),
            reason,
            policy: policy.redacted(),
            missing_values,
            allowed: total.allowed,
            refused: total.refused,
            bytes_out: total.bytes_out,
            bytes_in: total.bytes_in,
            rules: activity.rules(),
            refusals: activity.refusals(),
        })
    }

    /// After the adoption: gives back networks of VMs that are gone, and tells the egress process of those that go on.
    pub(super) async fn settle_networks(&self) -> Result<(), Error> {
        let Some(network) = self.network.network() else { return Ok(()) };
        let local = |source: ClientError| Error::Local {
            action: "look through the networks of this host".to_owned(),
            source: std::io::Error::other(source),
        };
        let with_vm = self.registry.with_vm();
        let wanted: HashSet<_> =
            with_vm.iter().filter_map(|sandbox| Some(owner(&sandbox.id, sandbox.vm()?.identity()))).collect();
        let mut after = String::new();
        loop {
            let (reply, _) = network.ask(Request::Owners { after: after.clone() }).await.map_err(local)?;
            let Reply::Owners(owners) = reply else { break };
            let Some(last) = owners.last() else { break };
            after.clone_from(last);
            for left in owners.into_iter().filter(|owner| !wanted.contains(owner)) {
                network.ask(Request::Release { owner: left }).await.map_err(local)?;
            }
        }
        self.tell_egress_again(network).await;
        Ok(())
    }

    /// Tells an egress process that may know nothing of every sandbox that has a network.
    async fn tell_egress_again(&self, network: &Network) {
        for sandbox in self.registry.with_vm() {
            let (Some(vm), spec) = (sandbox.vm(), sandbox.record().spec) else { continue };
            if !spec.network {
                continue;
            }
            let again = Request::Listeners { owner: owner(&sandbox.id, vm.identity()) };
            let Ok((_, descriptors)) = network.ask(again).await else { continue };
            let Ok(sockets) = <[OwnedFd; 3]>::try_from(descriptors) else { continue };
            let policy = spec.network_policy.as_ref().unwrap_or(&OPEN);
            if let Err(error) = self.tell_egress(network, &sandbox, policy, sockets).await {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "names do not lead anywhere for it");
            }
        }
    }
}

/// Starts the egress process again when it is gone, until `stop`.
pub(super) async fn run(core: Arc<Core>, stop: CancellationToken) {
    let Some(network) = core.network.network() else { return };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        match network.egress.ensure().await {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!("the egress process was gone and is started again");
                core.tell_egress_again(network).await;
            }
            Err(error) => tracing::error!(%error, "there is no egress process: names lead nowhere"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_told_of_the_same_network() {
        let device = device(NetworkLimits::default()).unwrap();
        assert_eq!((device.mac.to_string().as_str(), device.mtu), ("02:53:54:41:53:02", 1500));
        assert_eq!(on_command_line("quiet"), "quiet stasis.net=100.64.0.2/30,100.64.0.1,100.64.0.1,1500");
    }

    #[test]
    fn web_traffic_goes_to_the_proxy_where_names_or_transforms_matter() {
        let policy = |mode| NetworkPolicy { mode, ..NetworkPolicy::OPEN };
        assert!(!rules(&policy(Mode::AllowAll)).proxy && !rules(&policy(Mode::DenyAll)).proxy);
        assert!(rules(&policy(Mode::Custom)).proxy);
        let transform = Transform {
            domain: "a.example.com".to_owned(),
            inject_headers: std::collections::BTreeMap::new(),
            strip_headers: Vec::new(),
        };
        assert!(rules(&NetworkPolicy { transforms: vec![transform], ..NetworkPolicy::OPEN }).proxy);
        let listed = NetworkPolicy { allow_cidrs: vec!["10.1.2.3/8".to_owned()], ..policy(Mode::Custom) };
        assert_eq!(rules(&listed).allow, ["10.0.0.0/8".parse().unwrap()]);
    }
}
