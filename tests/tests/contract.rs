//! The API's own description against the published one that it implements (`tests/contract`): every operation, status and field of the contract
//! that is served is there, and a client made for the contract can send what it sends and read what it gets.

#![expect(clippy::unwrap_used, reason = "a document of another shape fails the test")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

/// Operations that answer 501 and are no routes of the contract but services in templates that there are not.
const NO_ROUTES: [&str; 2] = ["desktop", "code-interpreter"];

/// Fields of requests of which less is taken than the contract allows, and why.
const NARROWER: [(&str, &str, &str); 2] = [
    ("filesystemGrep", "pattern", "a search for nothing finds nothing: the text is required"),
    ("createSandbox", "mounts", "mounts are left out"),
];

/// Statuses of the contract that are never answered, and why.
const NEVER: [(&str, &str, &str); 1] =
    [("deletePresignedURL", "400", "an id that cannot be one is 404, as is every id of nothing")];

fn contract() -> Value {
    serde_saphyr::from_str(include_str!("../contract/leap0-openapi.yaml")).unwrap()
}

/// A path without the names of its parameters and without a slash at its end.
fn shape(path: &str) -> String {
    let parts = path.trim_end_matches('/').split('/');
    parts.map(|part| if part.starts_with('{') { "{}" } else { part }).collect::<Vec<_>>().join("/")
}

/// Every operation of a document with its path's own parameters, by shape and method.
fn operations(document: &Value) -> BTreeMap<(String, String), Value> {
    let mut out = BTreeMap::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let shared = methods["parameters"].as_array().cloned().unwrap_or_default();
        for (method, operation) in methods.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
            let mut operation = operation.clone();
            let own = operation["parameters"].as_array().cloned().unwrap_or_default();
            operation["parameters"] = json!([shared.clone(), own].concat());
            out.insert((method.clone(), shape(path)), operation);
        }
    }
    out
}

/// What a reference leads to.
fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str() {
        Some(at) => resolved(document, document.pointer(at.trim_start_matches('#')).unwrap_or(&Value::Null)),
        None => value,
    }
}

/// The types that a schema lets through. A contract's `integer` is a number, too.
fn types(document: &Value, schema: &Value) -> BTreeSet<String> {
    let of = resolved(document, schema);
    let mut out = BTreeSet::new();
    match &of["type"] {
        Value::String(one) => _ = out.insert(one.clone()),
        Value::Array(several) => out.extend(several.iter().filter_map(Value::as_str).map(str::to_owned)),
        _ => {}
    }
    if out.is_empty() {
        for choice in ["oneOf", "anyOf"].iter().filter_map(|name| of[*name].as_array()).flatten() {
            out.extend(types(document, choice));
        }
        if of["const"].is_string() || of["enum"][0].is_string() {
            out.insert("string".to_owned());
        }
    }
    if schema["nullable"] == true || of["nullable"] == true {
        out.insert("null".to_owned());
    }
    out
}

/// The values that a schema is limited to; none when it is not.
fn values(document: &Value, schema: &Value) -> Option<BTreeSet<String>> {
    let of = resolved(document, schema);
    if let Some(values) = of["enum"].as_array() {
        return Some(values.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    }
    let choices = of["oneOf"].as_array()?;
    choices.iter().map(|choice| choice["const"].as_str().map(str::to_owned)).collect()
}

fn properties<'a>(document: &'a Value, schema: &'a Value) -> Option<&'a Map<String, Value>> {
    resolved(document, schema)["properties"].as_object()
}

fn required(document: &Value, schema: &Value) -> BTreeSet<String> {
    let names = resolved(document, schema)["required"].as_array().into_iter().flatten();
    names.filter_map(Value::as_str).map(str::to_owned).collect()
}

struct Comparison {
    theirs: Value,
    ours: Value,
    wrong: Vec<String>,
}

impl Comparison {
    fn note(&mut self, at: &str, what: impl std::fmt::Display) {
        self.wrong.push(format!("{at}: {what}"));
    }

    /// What the contract lets a client send is taken.
    fn taken(&mut self, at: &str, theirs: &Value, ours: &Value) {
        let (contract, document) = (self.theirs.clone(), self.ours.clone());
        let (sent, taken) = (types(&contract, theirs), types(&document, ours));
        if !taken.is_empty() && !sent.iter().all(|kind| taken.contains(kind)) {
            self.note(at, format!("the contract sends {sent:?}, taken are {taken:?}"));
        }
        if let (Some(sent), Some(taken)) = (values(&contract, theirs), values(&document, ours))
            && !sent.is_subset(&taken)
        {
            self.note(at, format!("the contract sends {sent:?}, taken are {taken:?}"));
        }
        let (theirs, ours) = (resolved(&contract, theirs), resolved(&document, ours));
        for (bound, is_least) in [("minimum", true), ("maximum", false), ("minItems", true), ("maxItems", false)] {
            if let (Some(sent), Some(taken)) = (theirs[bound].as_f64(), ours[bound].as_f64())
                && if is_least { taken > sent } else { taken < sent }
            {
                self.note(at, format!("{bound} is {sent} in the contract and {taken} here"));
            }
        }
        let (needed, known) = (required(&document, ours), required(&contract, theirs));
        for name in needed.difference(&known) {
            self.note(&format!("{at}.{name}"), "is required here alone");
        }
        // A choice with null leads to the object that is meant.
        let object = |value: &Value| {
            let choices = value["anyOf"].as_array().into_iter().flatten();
            choices
                .filter(|choice| choice["$ref"].is_string())
                .find_map(|choice| properties(&document, choice).cloned())
        };
        let ours_of = properties(&document, ours).cloned().or_else(|| object(ours)).unwrap_or_default();
        for (name, field) in properties(&contract, theirs).into_iter().flatten() {
            let at = format!("{at}.{name}");
            match ours_of.get(name) {
                Some(ours) => self.taken(&at, field, ours),
                None => self.note(&at, "is not taken"),
            }
        }
        if theirs["items"].is_object() && ours["items"].is_object() {
            self.taken(&format!("{at}[]"), &theirs["items"], &ours["items"]);
        }
    }

    /// What is answered is what the contract lets a client expect.
    fn expected(&mut self, at: &str, theirs: &Value, ours: &Value, depth: usize) {
        if depth > 8 {
            return;
        }
        let (contract, document) = (self.theirs.clone(), self.ours.clone());
        let (known, sent) = (types(&contract, theirs), types(&document, ours));
        if !known.is_empty() && (sent.is_empty() || !sent.is_subset(&known)) {
            self.note(at, format!("the contract knows {known:?}, sent are {sent:?}"));
        }
        if let Some(known) = values(&contract, theirs) {
            match values(&document, ours) {
                Some(sent) if sent.is_subset(&known) => {}
                sent => self.note(at, format!("the contract knows {known:?}, sent are {sent:?}")),
            }
        }
        let (theirs, ours) = (resolved(&contract, theirs), resolved(&document, ours));
        if theirs["format"] == "date-time" && ours["format"] != "date-time" {
            self.note(at, "is no date-time");
        }
        for name in required(&contract, theirs).difference(&required(&document, ours)) {
            self.note(&format!("{at}.{name}"), "is required by the contract and may be absent here");
        }
        let ours_of = properties(&document, ours).cloned().unwrap_or_default();
        for (name, field) in properties(&contract, theirs).into_iter().flatten() {
            if let Some(ours) = ours_of.get(name) {
                self.expected(&format!("{at}.{name}"), field, ours, depth + 1);
            }
        }
        if theirs["items"].is_object() {
            self.expected(&format!("{at}[]"), &theirs["items"], &ours["items"], depth + 1);
        }
    }

    fn operation(&mut self, theirs: &Value, ours: &Value) {
        let at = theirs["operationId"].as_str().unwrap_or_default().to_owned();
        if theirs["operationId"] != ours["operationId"] {
            self.note(&at, format!("is called {} here", ours["operationId"]));
        }
        for parameter in theirs["parameters"].as_array().into_iter().flatten() {
            let parameter = resolved(&self.theirs, parameter).clone();
            // Parameters in paths have their places; their names are anybody's.
            if parameter["in"] == "path" {
                continue;
            }
            let same = |other: &&Value| other["in"] == parameter["in"] && other["name"] == parameter["name"];
            let at = format!("{at} {}", parameter["name"]);
            match ours["parameters"].as_array().into_iter().flatten().find(same) {
                None => self.note(&at, "is not taken"),
                Some(other) if other["required"] == true && parameter["required"] != true => {
                    self.note(&at, "is required here alone");
                }
                Some(other) => self.taken(&at, &parameter["schema"], &other["schema"]),
            }
        }
        for (media_type, body) in theirs["requestBody"]["content"].as_object().into_iter().flatten() {
            match ours["requestBody"]["content"].get(media_type) {
                Some(other) => self.taken(&format!("{at} body"), &body["schema"], &other["schema"]),
                None => self.note(&at, format!("does not take {media_type}")),
            }
        }
        for (status, answer) in theirs["responses"].as_object().into_iter().flatten() {
            let answer = resolved(&self.theirs, answer).clone();
            let at = format!("{at} {status}");
            let Some(other) = ours["responses"].get(status) else {
                self.note(&at, "is not answered");
                continue;
            };
            for (media_type, body) in answer["content"].as_object().into_iter().flatten() {
                match other["content"].get(media_type) {
                    // One of several shapes: the plain one is part of all of them.
                    Some(other) if body["schema"]["oneOf"].is_array() => {
                        let shapes = body["schema"]["oneOf"].as_array().cloned().unwrap_or_default();
                        self.expected(&at, &shapes[0], &other["schema"], 0);
                    }
                    Some(other) => self.expected(&at, &body["schema"], &other["schema"], 0),
                    None => self.note(&at, format!("has no {media_type}")),
                }
            }
        }
    }
}

#[test]
fn all_of_the_contract_is_served_or_left_out_by_name() {
    let mut all = Comparison { theirs: contract(), ours: stasis_api::routes::document(), wrong: Vec::new() };
    let (theirs, ours) = (operations(&all.theirs), operations(&all.ours));
    assert!(theirs.len() > 60 && ours.len() > 50, "{} and {} operations", theirs.len(), ours.len());
    let left_out: BTreeSet<(String, String)> = all.ours["x-left-out"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["method"].as_str().unwrap().to_owned(), shape(one["path"].as_str().unwrap())))
        .collect();
    for (key, operation) in &theirs {
        match ours.get(key) {
            Some(other) => {
                assert!(!left_out.contains(key), "{key:?} is served and listed as left out");
                all.operation(operation, other);
            }
            None => assert!(left_out.contains(key), "{key:?} is neither served nor left out"),
        }
    }
    for key in &left_out {
        let known = theirs.contains_key(key) || NO_ROUTES.iter().any(|part| key.1.contains(part));
        assert!(known, "{key:?} is left out of nothing");
    }
    let excused = |line: &String| {
        NARROWER.iter().any(|(operation, field, _)| line.starts_with(&format!("{operation} body.{field}")))
            || NEVER.iter().any(|(operation, status, _)| *line == format!("{operation} {status}: is not answered"))
    };
    all.wrong.retain(|line| !excused(line));
    assert!(all.wrong.is_empty(), "{} differences:\n{}", all.wrong.len(), all.wrong.join("\n"));
}

/// The comparison itself can fail.
#[test]
fn a_field_that_is_lost_is_found() {
    let (theirs, mut ours) = (contract(), stasis_api::routes::document());
    let sandbox = ours.pointer_mut("/components/schemas/Sandbox").unwrap();
    sandbox["required"].as_array_mut().unwrap().retain(|name| name != "memory");
    sandbox["properties"]["vcpu"]["type"] = json!("string");
    ours["paths"]["/v1/sandbox/{id}/pause"]["post"]["responses"].as_object_mut().unwrap().remove("409");
    let key = ("post".to_owned(), "/v1/sandbox/{}/pause".to_owned());
    let (their_one, our_one) = (operations(&theirs)[&key].clone(), operations(&ours)[&key].clone());
    let mut one = Comparison { theirs, ours, wrong: Vec::new() };
    one.operation(&their_one, &our_one);
    let expected = ["pauseSandbox 201.memory", "pauseSandbox 201.vcpu", "pauseSandbox 409"];
    assert!(
        one.wrong.len() == 3 && expected.iter().all(|at| one.wrong.iter().any(|line| line.starts_with(at))),
        "{:?}",
        one.wrong
    );
}

#[test]
fn the_description_is_whole() {
    let document = stasis_api::routes::document();
    let text = document.to_string();
    for at in text.split("\"$ref\":\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document.pointer(at).is_some(), "{at} leads nowhere");
    }
    let mut ids = BTreeSet::new();
    for ((method, path), operation) in operations(&document) {
        let at = format!("{method} {path}");
        assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{at}: its id is another's, too");
        assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{at}: no summary");
        let answers = operation["responses"].as_object().unwrap();
        assert!(answers.keys().any(|status| status < &"400".to_owned()), "{at}: no success");
        let needs_key = operation["security"] != json!([]);
        assert_eq!(needs_key, answers.contains_key("401"), "{at}: 401 and security");
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let said = parameter["description"].as_str().is_some_and(|text| !text.is_empty());
            assert!(said, "{at}: {} is not described", parameter["name"]);
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            let said = property["description"].is_string() || property["$ref"].is_string();
            assert!(said, "{name}.{field} is not described");
        }
    }
}
