//! What a registry is told of a client, and how a client's keys become that.
//!
//! Every registry takes a user name and a password. Amazon's (ECR) has none of its own: its API gives a password for a key, good for twelve
//! hours, so one request goes there first, signed with the key (Signature Version 4). The key's secret itself is sent to nobody.
//!
//! Nothing of this is kept or printed: it is used for one pull.

use super::ImageError;
use crate::config::Templates as Limits;
use crate::sources::UnixMs;
use aws_credential_types::Credentials as SigningKey;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4::SigningParams;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::fmt;
use std::time::{Duration, UNIX_EPOCH};

/// For Amazon's answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Octets of it at most.
const MAX_ANSWER: usize = 64 << 10;
/// The service that a signature is for.
const SERVICE: &str = "ecr";
const ACTION: &str = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
const CONTENT_TYPE: &str = "application/x-amz-json-1.1";

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A user name and a password, as registries take them.
#[derive(Clone, PartialEq, Eq)]
pub struct Password {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

/// A key of Amazon's.
#[derive(Clone, PartialEq, Eq)]
pub struct AmazonKey {
    /// Its id.
    pub id: String,
    /// Its secret.
    pub secret: String,
    /// Where the registry is, such as `eu-central-1`.
    pub region: String,
}

/// What a client gives to be let into a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// What the registry takes as it is.
    Password(Password),
    /// What Amazon gives a password for.
    Amazon(AmazonKey),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// What the registry takes; asks Amazon at `now` where that is who knows.
    pub(super) async fn password(&self, limits: &Limits, now: UnixMs) -> Result<Password, ImageError> {
        match self {
            Self::Password(password) => Ok(password.clone()),
            Self::Amazon(key) => key.password(limits.ecr_endpoint.as_deref(), now).await,
        }
    }
}

/// The region that a name of Amazon's registries says: `<account>.dkr.ecr.<region>.amazonaws.com`.
pub fn region_of(registry: &str) -> Option<&str> {
    let (_, rest) = registry.split_once(".dkr.ecr.")?;
    let (region, domain) = rest.split_once('.')?;
    (domain.starts_with("amazonaws.com") && is_region(region)).then_some(region)
}

/// It may be a part of a host name.
pub fn is_region(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    authorization_data: Vec<Authorization>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Authorization {
    /// `user:password` in base64.
    authorization_token: String,
}

impl AmazonKey {
    async fn password(&self, endpoint: Option<&str>, now: UnixMs) -> Result<Password, ImageError> {
        let url = endpoint.map_or_else(|| self.url(), str::to_owned);
        let failed = |unreachable, source: BoxError| ImageError::Registry {
            reference: url.clone(),
            action: "get a password for the key".to_owned(),
            unreachable,
            source,
        };
        let client = reqwest::Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).build();
        let client = client.map_err(|e| failed(true, e.into()))?;
        let mut request = client.post(&url).body("{}");
        for (name, value) in self.signed(&url, "{}", now).map_err(|e| failed(false, e))? {
            request = request.header(name, value);
        }
        let mut answer = request.send().await.map_err(|e| failed(true, e.without_url().into()))?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(|e| failed(true, e.without_url().into()))? {
            body.extend_from_slice(&piece);
            if body.len() > MAX_ANSWER {
                return Err(failed(false, format!("its answer is longer than {MAX_ANSWER} octets").into()));
            }
        }
        if !status.is_success() {
            return Err(failed(status.is_server_error(), refusal(status.as_u16(), &body).into()));
        }
        read(&body).ok_or_else(|| failed(false, "its answer has no password".into()))
    }

    fn url(&self) -> String {
        let china = if self.region.starts_with("cn-") { ".cn" } else { "" };
        format!("https://api.ecr.{}.amazonaws.com{china}/", self.region)
    }

    /// The headers of a request for a password.
    fn signed(&self, url: &str, body: &str, now: UnixMs) -> Result<Vec<(String, String)>, BoxError> {
        let identity = SigningKey::new(&self.id, &self.secret, None, None, "request").into();
        let time = UNIX_EPOCH + Duration::from_millis(u64::try_from(now).unwrap_or(0));
        let params = SigningParams::builder()
            .identity(&identity)
            .region(&self.region)
            .name(SERVICE)
            .time(time)
            .settings(SigningSettings::default())
            .build()?
            .into();
        let ours = [("content-type", CONTENT_TYPE), ("x-amz-target", ACTION)];
        let request = SignableRequest::new("POST", url, ours.into_iter(), SignableBody::Bytes(body.as_bytes()))?;
        let (instructions, _) = sign(request, &params)?.into_parts();
        let signature = instructions.headers().map(|(name, value)| (name.to_owned(), value.to_owned()));
        Ok(ours.map(|(name, value)| (name.to_owned(), value.to_owned())).into_iter().chain(signature).collect())
    }
}

/// What Amazon says of a request that it refuses: the kind alone, since its text may quote the request.
fn refusal(status: u16, body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Refusal {
        #[serde(rename = "__type")]
        kind: String,
    }
    let kind = serde_json::from_slice::<Refusal>(body).map(|refusal| refusal.kind).unwrap_or_default();
    let kind = kind.rsplit('#').next().unwrap_or_default();
    if kind.is_empty() { format!("status {status}") } else { format!("status {status}, {kind}") }
}

fn read(body: &[u8]) -> Option<Password> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let token = STANDARD.decode(&answer.authorization_data.first()?.authorization_token).ok()?;
    let (username, password) = std::str::from_utf8(&token).ok()?.split_once(':')?;
    Some(Password { username: username.to_owned(), password: password.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(region: &str) -> AmazonKey {
        AmazonKey { id: "AKIDEXAMPLE".to_owned(), secret: "hush".to_owned(), region: region.to_owned() }
    }

    #[test]
    fn the_name_of_a_registry_says_its_region() {
        for (name, region) in [
            ("123456789012.dkr.ecr.eu-central-1.amazonaws.com", Some("eu-central-1")),
            ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", Some("cn-north-1")),
            ("docker.io", None),
            ("x.dkr.ecr.eu-central-1.evil.example", None),
            ("x.dkr.ecr.evil/.amazonaws.com", None),
        ] {
            assert_eq!(region_of(name), region, "{name}");
        }
        for bad in ["", "a.b", "a/b", "A", &"a".repeat(33)] {
            assert!(!is_region(bad), "{bad}");
        }
        assert_eq!(key("eu-west-1").url(), "https://api.ecr.eu-west-1.amazonaws.com/");
        assert_eq!(key("cn-north-1").url(), "https://api.ecr.cn-north-1.amazonaws.com.cn/");
    }

    #[test]
    fn a_request_is_signed_for_its_time_and_region_and_has_no_secret() {
        let key = key("eu-west-1");
        let signed = |now| key.signed(&key.url(), "{}", now).unwrap();
        let headers = signed(1_700_000_000_000);
        let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()).unwrap();
        assert_eq!((value("x-amz-date"), value("x-amz-target")), ("20231114T221320Z", ACTION));
        let expected = "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20231114/eu-west-1/ecr/aws4_request, ";
        assert!(value("authorization").starts_with(expected), "{}", value("authorization"));
        assert!(!format!("{headers:?}").contains("hush"));
        assert_ne!(signed(1_700_000_001_000), headers);
    }

    #[test]
    fn an_answer_is_a_user_and_a_password() {
        let body = |token: &str| format!(r#"{{"authorizationData":[{{"authorizationToken":"{token}"}}]}}"#);
        let password = read(body(&STANDARD.encode("AWS:a:b")).as_bytes()).unwrap();
        assert_eq!((password.username.as_str(), password.password.as_str()), ("AWS", "a:b"));
        for bad in [body("%"), body(&STANDARD.encode("AWS")), r#"{"authorizationData":[]}"#.to_owned(), "<".to_owned()]
        {
            assert!(read(bad.as_bytes()).is_none(), "{bad}");
        }
        assert_eq!(
            refusal(400, br#"{"__type":"a#InvalidSignatureException","message":"x"}"#),
            "status 400, InvalidSignatureException"
        );
        assert_eq!(refusal(503, b"busy"), "status 503");
    }
}
