//! Templates from container images. A build runs in a task of its own: a client that hangs up, or whose patience ends, finds the template in
//! the list, being made or ready. What failed stays in the list with its reason until the name is used again, or the supervisor ends.
//!
//! A template is deleted only when nothing needs its root file system: no sandbox, whatever its state, and no named snapshot. It is withdrawn
//! before that is looked at for the last time: a create that comes later does not find it, and one that came before is in the registry.

use super::{Core, blocking, detached, snapshots};
use crate::admission::Scope;
use crate::error::Error;
use crate::image::{self, ImageError, Progress, Stand};
use crate::sources::UnixMs;
use crate::states::State;
use crate::template::uploads::{Scratch, Uploads};
use crate::template::{self, Ready, Template, TemplateError};
use crate::template_request::{List, Upload};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// `tpl-` and so many random characters.
const ID_CHARS: usize = 20;
/// Failed builds that are remembered, of all tenants.
const FAILED: usize = 64;

/// The builds of this supervisor, and what they make.
#[derive(Debug)]
pub struct Builds {
    uploads: Uploads,
    slots: Semaphore,
    /// Held while names are compared and templates come or go, so that two of one name cannot both find that there is none.
    jobs: Mutex<Vec<Arc<Job>>>,
}

/// A template that is being made, or that could not be.
#[derive(Debug)]
pub struct Job {
    /// The template's id.
    pub id: String,
    /// Whose.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// Where the image is.
    pub uri: String,
    /// When it was asked for.
    pub created_at: UnixMs,
    progress: Arc<Progress>,
    failed: Mutex<Option<String>>,
}

impl Job {
    /// How far it is.
    pub fn stand(&self) -> Stand {
        self.progress.stand()
    }

    /// Why it failed; `None` while it goes on.
    pub fn failed(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One line of a list.
#[derive(Clone, Debug)]
pub enum Listed {
    /// Sandboxes can be made from it.
    Ready(Box<Template>),
    /// Not yet, or never.
    Job(Arc<Job>),
}

impl Listed {
    fn id(&self) -> String {
        match self {
            Self::Ready(template) => template.id(),
            Self::Job(job) => job.id.clone(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Ready(template) => &template.name,
            Self::Job(job) => &job.name,
        }
    }

    /// The operator's first, by name; then the tenant's, the newest first.
    fn order(&self) -> (bool, i64, String) {
        match self {
            Self::Ready(template) => match &template.upload {
                None => (false, 0, template.name.clone()),
                Some(upload) => (true, -upload.created_at, template.name.clone()),
            },
            Self::Job(job) => (true, -job.created_at, job.name.clone()),
        }
    }
}

impl Builds {
    pub(super) fn new(uploads: Uploads, at_once: usize) -> Self {
        Self { uploads, slots: Semaphore::new(at_once), jobs: Mutex::default() }
    }

    fn jobs(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(jobs: &mut Vec<Arc<Job>>, id: &str) {
        jobs.retain(|job| job.id != id);
    }
}

/// Makes a template of `tenant` from an image and waits until it can be used.
pub async fn upload(core: &Arc<Core>, tenant: &str, asked: Upload) -> Result<Template, Error> {
    let job = Arc::new(Job {
        id: format!("tpl-{}", core.sources.word(ID_CHARS)),
        tenant: tenant.to_owned(),
        name: asked.name.clone(),
        uri: asked.reference.to_string(),
        created_at: core.sources.now_ms(),
        progress: Arc::default(),
        failed: Mutex::default(),
    });
    let reserved = (core.clone(), job.clone());
    blocking(move || reserve(&reserved.0, &reserved.1)).await?;
    let core = core.clone();
    detached(async move {
        let outcome = build(&core, &job, &asked).await;
        match &outcome {
            Ok(template) => {
                tracing::info!(id = job.id, name = job.name, digest = template.digest, "a template was made");
            }
            Err(error) => {
                let reason = error.chain();
                tracing::warn!(id = job.id, name = job.name, uri = job.uri, reason, "an image became no template");
                *job.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
                forget_old(&mut core.builds.jobs());
            }
        }
        outcome
    })
    .await
}

/// The oldest failures, beyond what is remembered.
fn forget_old(jobs: &mut Vec<Arc<Job>>) {
    let mut over = jobs.iter().filter(|job| job.failed().is_some()).count().saturating_sub(FAILED);
    jobs.retain(|job| {
        let forget = over > 0 && job.failed().is_some();
        over -= usize::from(forget);
        !forget
    });
}

/// Takes the name, if it is free and the tenant may have one more.
fn reserve(core: &Core, job: &Arc<Job>) -> Result<(), Error> {
    let mut jobs = core.builds.jobs();
    let visible = core.templates.visible(&job.tenant, &core.journal)?;
    let ours: Vec<_> = jobs.iter().filter(|other| other.tenant == job.tenant && other.failed().is_none()).collect();
    if visible.iter().any(|t| t.name == job.name) || ours.iter().any(|other| other.name == job.name) {
        return Err(Error::TemplateExists(job.name.clone()));
    }
    let building = jobs.iter().filter(|other| other.failed().is_none()).count();
    let limits = &core.config.templates;
    for (scope, most, taken) in [
        (Scope::Tenant, limits.per_tenant, visible.iter().filter(|t| t.upload.is_some()).count() + ours.len()),
        (Scope::Host, limits.per_host, core.templates.uploaded()? + building),
    ] {
        if taken >= most {
            return Err(Error::TooManyTemplates { most, scope });
        }
    }
    // A failure of that name is answered by this try.
    jobs.retain(|other| other.tenant != job.tenant || other.name != job.name);
    jobs.push(job.clone());
    Ok(())
}

async fn build(core: &Arc<Core>, job: &Arc<Job>, asked: &Upload) -> Result<Template, Error> {
    let ms = core.config.templates.build_ms;
    let made = async {
        job.progress.begin("waits for others", 0);
        let _slot = core.builds.slots.acquire().await.map_err(|_| Error::Bug("builds that are closed"))?;
        let (boot, scratch) = {
            let (core, job) = (core.clone(), job.clone());
            blocking(move || prepare(&core, &job)).await?
        };
        let (work, rootfs) = (scratch.work(), scratch.rootfs());
        let limits = &core.config.templates;
        let (credentials, now) = (asked.credentials.as_ref(), core.sources.now_ms());
        let (launcher, progress) = (&core.launcher, &job.progress);
        let built =
            image::build(launcher, &asked.reference, credentials, limits, &work, &rootfs, progress, now).await?;
        let (core, job) = (core.clone(), job.clone());
        blocking(move || publish(&core, &job, &scratch, &boot, built)).await
    };
    let Ok(outcome) = tokio::time::timeout(Duration::from_millis(ms), made).await else {
        job.progress.stop();
        return Err(
            ImageError::Deadline { what: format!("the build of template {:?}", job.name), ms: ms.into() }.into()
        );
    };
    outcome
}

/// The template whose kernel boots the image, and a place to work.
fn prepare(core: &Core, job: &Job) -> Result<(Template, Scratch), Error> {
    let name = &core.config.templates.boot;
    let boot = match core.templates.find("", name, &core.journal) {
        Err(TemplateError::Unknown { .. }) => {
            return Err(Error::Host(format!(
                "there is no template {name:?} whose kernel could boot an image (templates.boot): build the images first"
            )));
        }
        other => other?,
    };
    if boot.ready != Ready::Agent || boot.rootfs.is_none() {
        return Err(Error::Host(format!(
            "template {name:?} (templates.boot) has no agent or no disk: it boots no image"
        )));
    }
    let scratch = core.builds.uploads.scratch(&job.id);
    let scratch = scratch.map_err(|source| Error::Local { action: "make room for a template".to_owned(), source })?;
    Ok((boot, scratch))
}

fn publish(core: &Core, job: &Job, scratch: &Scratch, boot: &Template, built: image::Built) -> Result<Template, Error> {
    let upload = template::Upload {
        id: job.id.clone(),
        tenant: job.tenant.clone(),
        uri: job.uri.clone(),
        image_digest: built.digest,
        process: built.process,
        created_at: job.created_at,
    };
    job.progress.begin("digest", 0);
    template::note_digest(&scratch.rootfs()).map_err(failed("read the root file system"))?;
    let mut jobs = core.builds.jobs();
    core.builds
        .uploads
        .publish(scratch, &job.name, upload, boot, core.config.templates.disk_mib)
        .map_err(failed("keep the template"))?;
    Builds::remove(&mut jobs, &job.id);
    drop(jobs);
    Ok(core.templates.find(&job.tenant, &job.name, &core.journal)?)
}

fn failed(action: &str) -> impl FnOnce(std::io::Error) -> Error {
    let action = action.to_owned();
    move |source| Error::Local { action, source }
}

/// Everything that `tenant` may use or is making.
async fn all(core: &Arc<Core>, tenant: &str) -> Result<Vec<Listed>, Error> {
    let (core, tenant) = (core.clone(), tenant.to_owned());
    blocking(move || {
        // Jobs first: one that ends meanwhile is listed twice rather than not at all, and then once.
        let jobs: Vec<_> = core.builds.jobs().iter().filter(|job| job.tenant == tenant).cloned().collect();
        let ready = core.templates.visible(&tenant, &core.journal)?;
        let mut all: Vec<_> = jobs
            .into_iter()
            .filter(|job| ready.iter().all(|template| template.id() != job.id))
            .map(Listed::Job)
            .collect();
        all.extend(ready.into_iter().map(|template| Listed::Ready(Box::new(template))));
        all.sort_by_key(Listed::order);
        Ok(all)
    })
    .await
}

/// One page of them, and how many there are.
pub async fn list(core: &Arc<Core>, tenant: &str, list: &List) -> Result<(Vec<Listed>, usize), Error> {
    let mut all = all(core, tenant).await?;
    all.retain(|one| one.name().contains(&list.query));
    let total = all.len();
    Ok((all.into_iter().skip((list.page - 1) * list.page_size).take(list.page_size).collect(), total))
}

/// The one with that id.
pub async fn get(core: &Arc<Core>, tenant: &str, id: &str) -> Result<Listed, Error> {
    all(core, tenant).await?.into_iter().find(|one| one.id() == id).ok_or_else(|| Error::NoTemplate(id.to_owned()))
}

/// The tenant's own template with that id.
async fn own(
    core: &Arc<Core>,
    tenant: &str,
    id: &str,
    verb: &'static str,
) -> Result<(Template, template::Upload), Error> {
    let fixed = |why| Err(Error::TemplateFixed { id: id.to_owned(), verb, why });
    match get(core, tenant, id).await? {
        Listed::Ready(template) => match template.upload.clone() {
            Some(upload) => Ok((*template, upload)),
            None => fixed("it is the operator's"),
        },
        Listed::Job(job) if job.failed().is_none() => fixed("it is being made"),
        Listed::Job(_) => fixed("it could not be made"),
    }
}

/// Gives a template another name.
pub async fn rename(core: &Arc<Core>, tenant: &str, id: &str, name: String) -> Result<(), Error> {
    let (template, upload) = own(core, tenant, id, "rename").await?;
    if template.name == name {
        return Ok(());
    }
    let (core, tenant) = (core.clone(), tenant.to_owned());
    detached(blocking(move || {
        let jobs = core.builds.jobs();
        let taken = jobs.iter().any(|job| job.tenant == tenant && job.name == name && job.failed().is_none());
        if taken || core.templates.visible(&tenant, &core.journal)?.iter().any(|t| t.name == name) {
            return Err(Error::TemplateExists(name));
        }
        core.builds.uploads.rename(&upload, &name).map_err(failed("rename the template"))
    }))
    .await
}

/// Deletes a template that nothing needs, or forgets one that could not be made.
pub async fn delete(core: &Arc<Core>, tenant: &str, id: &str) -> Result<(), Error> {
    if let Listed::Job(job) = get(core, tenant, id).await?
        && job.failed().is_some()
    {
        Builds::remove(&mut core.builds.jobs(), id);
        return Ok(());
    }
    let (template, upload) = own(core, tenant, id, "delete").await?;
    unused(core, &template, &upload).await?;
    let core = core.clone();
    detached(async move {
        let uploads = core.builds.uploads.clone();
        let withdrawn = {
            let upload = upload.clone();
            blocking(move || uploads.withdraw(&upload).map_err(failed("withdraw the template"))).await?
        };
        let still_unused = unused(&core, &template, &upload).await;
        blocking(move || {
            let (done, action) = match still_unused {
                Ok(()) => (withdrawn.remove(), "delete the template"),
                Err(_) => (withdrawn.put_back(), "put the template back"),
            };
            done.map_err(failed(action))?;
            still_unused
        })
        .await
    })
    .await
}

/// Nothing of the tenant's needs the template's root file system. Deleted sandboxes do not count: they cannot be put back without it.
async fn unused(core: &Core, template: &Template, upload: &template::Upload) -> Result<(), Error> {
    let needs = |digest: &Option<String>| *digest == template.rootfs_digest;
    let in_use = |by: String| Err(Error::TemplateInUse { id: upload.id.clone(), by });
    let snapshots = snapshots::list(core, &upload.tenant).await?;
    if let Some(snapshot) = snapshots.iter().find(|snapshot| needs(&snapshot.spec.rootfs_digest)) {
        return in_use(format!("snapshot {:?}", snapshot.name));
    }
    let sandbox = core.registry.all().into_iter().find(|sandbox| {
        sandbox.tenant == upload.tenant
            && sandbox.state() != State::Deleted
            && needs(&sandbox.record().spec.rootfs_digest)
    });
    sandbox.map_or(Ok(()), |sandbox| in_use(format!("sandbox {}", sandbox.id)))
}
