//! Requests about templates, from JSON and queries to checked values. Pure, as [`crate::validate`] is.

use crate::image::{AmazonKey, Credentials, Password, Reference, is_region, region_of};
use crate::validate::{FieldError, FieldErrors};
use serde_json::{Map, Value};

/// Characters of a name, and of a reference, at most.
const MAX_NAME: usize = 64;
const MAX_URI: usize = 500;
/// Octets of a credential at most.
const MAX_CREDENTIAL: usize = 16 << 10;
/// What the names of the operator's templates begin with.
const SYSTEM: &str = "system/";

/// A checked request for a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    /// Its name.
    pub name: String,
    /// Where the image is.
    pub reference: Reference,
    /// What its registry is told.
    pub credentials: Option<Credentials>,
}

/// A checked list query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// Only templates with this in their name.
    pub query: String,
    /// From 1.
    pub page: usize,
    /// 1 to 100.
    pub page_size: usize,
}

fn text<'a>(fields: &'a Map<String, Value>, path: &str, limit: usize, errors: &mut FieldErrors) -> &'a str {
    let field = path.rsplit('.').next().unwrap_or(path);
    match fields.get(field) {
        None | Some(Value::Null) => errors.add(path, "is required"),
        Some(Value::String(text)) if text.trim().is_empty() => errors.add(path, "must not be empty"),
        Some(Value::String(text)) if text.chars().count() > limit => {
            errors.add(path, format!("must have at most {limit} characters"));
        }
        Some(Value::String(text)) => return text.trim(),
        Some(_) => errors.add(path, "must be a string"),
    }
    ""
}

fn name(body: &Map<String, Value>, errors: &mut FieldErrors) -> String {
    let name = text(body, "name", MAX_NAME, errors);
    if name.starts_with(SYSTEM) {
        errors.add("name", format!("must not start with {SYSTEM}"));
    }
    if name.contains(|c: char| c.is_whitespace() || c.is_control()) {
        errors.add("name", "must not contain white space");
    }
    name.to_owned()
}

/// Checks a request for a template.
pub fn upload(body: &Map<String, Value>) -> Result<Upload, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let name = name(body, &mut errors);
    let uri = text(body, "uri", MAX_URI, &mut errors);
    let reference = match Reference::parse(uri) {
        Ok(reference) => Some(reference),
        Err(error) => {
            if !uri.is_empty() {
                errors.add("uri", error.to_string());
            }
            None
        }
    };
    let credentials = match body.get("credentials") {
        None | Some(Value::Null) => None,
        Some(Value::Object(fields)) => credentials(fields, reference.as_ref(), &mut errors),
        Some(_) => {
            errors.add("credentials", "must be an object");
            None
        }
    };
    match reference {
        Some(reference) => errors.or(Upload { name, reference, credentials }),
        None => Err(errors.into_list()),
    }
}

/// What a registry is told, by the kind of the credentials. Google's and Azure's take a key as a password.
fn credentials(
    fields: &Map<String, Value>,
    reference: Option<&Reference>,
    errors: &mut FieldErrors,
) -> Option<Credentials> {
    let mut get = |field: &str| text(fields, &format!("credentials.{field}"), MAX_CREDENTIAL, errors).to_owned();
    let password = |username: String, password: String| Some(Credentials::Password(Password { username, password }));
    match fields.get("type").and_then(Value::as_str) {
        Some("basic") => password(get("username"), get("password")),
        Some("gcp") => password("_json_key".to_owned(), get("gcp_service_account_json")),
        Some("azure") => {
            // The registry knows its tenant; the contract wants it to be said.
            get("azure_tenant_id");
            password(get("azure_client_id"), get("azure_client_secret"))
        }
        Some("aws") => {
            let (id, secret) = (get("aws_access_key_id"), get("aws_secret_access_key"));
            let region = region(fields, reference, errors)?;
            Some(Credentials::Amazon(AmazonKey { id, secret, region }))
        }
        _ => {
            errors.add("credentials.type", "must be basic, gcp, azure or aws");
            None
        }
    }
}

/// Of Amazon's registry: what the client says, else what the registry's name says.
fn region(fields: &Map<String, Value>, reference: Option<&Reference>, errors: &mut FieldErrors) -> Option<String> {
    const FIELD: &str = "credentials.aws_region";
    match fields.get("aws_region") {
        None | Some(Value::Null) => {
            let named = match reference {
                Some(Reference::Registry(name)) => region_of(name.registry()),
                Some(Reference::Local(_)) | None => None,
            };
            if named.is_none() {
                errors.add(FIELD, "is required: the name of the registry does not say it");
            }
            named.map(str::to_owned)
        }
        Some(Value::String(region)) if is_region(region) => Some(region.clone()),
        Some(_) => {
            errors.add(FIELD, "must be a region, such as eu-central-1");
            None
        }
    }
}

/// Checks a request for another name.
pub fn rename(body: &Map<String, Value>) -> Result<String, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let name = name(body, &mut errors);
    errors.or(name)
}

/// Checks the query of a list. Names are matched with `-` and `_` alike.
pub fn list(query: &[(String, String)]) -> Result<List, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let mut out = List { query: String::new(), page: 1, page_size: 20 };
    for (name, value) in query.iter().filter(|(_, value)| !value.is_empty()) {
        match name.replace('_', "-").as_str() {
            "query" if value.chars().count() <= MAX_NAME => out.query.clone_from(value),
            "query" => errors.add(name, format!("must have at most {MAX_NAME} characters")),
            "page" => match value.parse() {
                Ok(page @ 1..=1_000_000) => out.page = page,
                _ => errors.add(name, "must be a whole number from 1"),
            },
            "page-size" => match value.parse() {
                Ok(size @ 1..=100) => out.page_size = size,
                _ => errors.add(name, "must be a whole number from 1 to 100"),
            },
            _ => {}
        }
    }
    errors.or(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Upload, Vec<String>> {
        upload(body.as_object().unwrap()).map_err(|errors| errors.into_iter().map(|e| e.field).collect())
    }

    #[test]
    fn an_upload_is_a_name_and_a_reference() {
        let asked = read(&json!({"name": " app ", "uri": "python:3.12"})).unwrap();
        assert_eq!(
            (asked.name.as_str(), asked.reference.to_string().as_str()),
            ("app", "docker.io/library/python:3.12")
        );
        assert_eq!(asked.credentials, None);
        assert_eq!(read(&json!({})).unwrap_err(), ["name", "uri"]);
        for name in ["", "a b", "system/x", "a\tb", &"x".repeat(65)] {
            assert_eq!(read(&json!({"name": name, "uri": "x"})).unwrap_err(), ["name"], "{name:?}");
        }
        for uri in ["../x", &"x".repeat(501), "docker-daemon://x"] {
            assert_eq!(read(&json!({"name": "x", "uri": uri})).unwrap_err(), ["uri"], "{uri:?}");
        }
    }

    #[test]
    fn each_kind_of_credentials_has_its_fields() {
        let with = |credentials: Value| read(&json!({"name": "x", "uri": "x", "credentials": credentials}));
        let of = |credentials: Value| match with(credentials).unwrap().credentials {
            Some(Credentials::Password(Password { username, password })) => (username, password),
            other => panic!("{other:?}"),
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(of(json!({"type": "basic", "username": "u", "password": "p"})), pair("u", "p"));
        assert_eq!(of(json!({"type": "gcp", "gcp_service_account_json": "{}"})), pair("_json_key", "{}"));
        let azure =
            json!({"type": "azure", "azure_client_id": "i", "azure_client_secret": "s", "azure_tenant_id": "t"});
        assert_eq!(of(azure), pair("i", "s"));
        assert_eq!(with(json!({"type": "basic", "username": "u"})).unwrap_err(), ["credentials.password"]);
        assert_eq!(with(json!({"type": "ssh"})).unwrap_err(), ["credentials.type"]);
        let aws = |uri: &str, more: Value| {
            let mut credentials = json!({"type": "aws", "aws_access_key_id": "i", "aws_secret_access_key": "s"});
            credentials.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            read(&json!({"name": "x", "uri": uri, "credentials": credentials})).map(|asked| asked.credentials)
        };
        let key = |region: &str| AmazonKey { id: "i".to_owned(), secret: "s".to_owned(), region: region.to_owned() };
        let ecr = "1.dkr.ecr.eu-west-1.amazonaws.com/app";
        for (uri, more, region) in [
            (ecr, json!({}), "eu-west-1"),
            (ecr, json!({"aws_region": "us-east-1"}), "us-east-1"),
            ("registry.example/app", json!({"aws_region": "us-east-1"}), "us-east-1"),
        ] {
            assert_eq!(aws(uri, more).unwrap(), Some(Credentials::Amazon(key(region))), "{uri}");
        }
        for (uri, more) in [
            ("registry.example/app", json!({})),
            (ecr, json!({"aws_region": "evil.example/"})),
            (ecr, json!({"aws_region": 1})),
        ] {
            assert_eq!(aws(uri, more).unwrap_err(), ["credentials.aws_region"]);
        }
        assert_eq!(aws(ecr, json!({"aws_secret_access_key": ""})).unwrap_err(), ["credentials.aws_secret_access_key"]);
        assert_eq!(with(json!("u:p")).unwrap_err(), ["credentials"]);
        let secret = with(json!({"type": "basic", "username": "u", "password": "hush"})).unwrap();
        assert!(!format!("{secret:?}").contains("hush"));
    }

    #[test]
    fn list_queries_are_checked() {
        let read = |name: &str, value: &str| list(&[(name.to_owned(), value.to_owned())]);
        assert_eq!(read("page_size", "7").unwrap().page_size, 7);
        assert_eq!(read("query", "").unwrap().query, "");
        for (name, value) in [("page", "0"), ("page-size", "101"), ("query", &"x".repeat(65))] {
            assert_eq!(read(name, value).unwrap_err()[0].field, name);
        }
    }
}
