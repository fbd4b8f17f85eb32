//! Users and groups of the guest, read from `/etc/passwd` and `/etc/group`: a static program has no name service to ask.

use std::fs;
use std::path::Path;

/// Databases larger than this are not read whole: names beyond it are numbers.
const DATABASE_LIMIT: usize = 4 << 20;

/// A user that commands can run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    pub(crate) shell: String,
    /// Groups beside `gid`.
    pub(crate) groups: Vec<u32>,
}

/// Both databases as text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Those of the file system below `root`. A missing database has no names.
    pub(crate) fn read(root: &Path) -> Self {
        let text = |name: &str| {
            let mut bytes = fs::read(root.join("etc").join(name)).unwrap_or_default();
            bytes.truncate(DATABASE_LIMIT);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Self { passwd: text("passwd"), group: text("group") }
    }

    /// The user of this name or number. A number needs no entry: its group is the same number then, its home `/`.
    pub(crate) fn user(&self, wanted: &str) -> Option<Account> {
        let number = wanted.parse::<u32>().ok();
        let found = self.passwd.lines().find_map(|line| {
            let [name, _, uid, gid, _, home, shell] = fields(line)?;
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            (name == wanted || number == Some(uid)).then(|| Account {
                name: name.to_owned(),
                uid,
                gid,
                home: home.to_owned(),
                shell: shell.to_owned(),
                groups: self.groups_of(name),
            })
        });
        found.or_else(|| {
            let id = number?;
            Some(Account {
                name: wanted.to_owned(),
                uid: id,
                gid: id,
                home: "/".to_owned(),
                shell: String::new(),
                groups: Vec::new(),
            })
        })
    }

    fn groups_of(&self, user: &str) -> Vec<u32> {
        let member = |line: &str| {
            let [_, _, gid, members] = fields(line)?;
            members.split(',').any(|member| member == user).then(|| gid.parse().ok())?
        };
        self.group.lines().filter_map(member).collect()
    }

    /// The number of a user, from a name or a number.
    pub(crate) fn uid(&self, wanted: &str) -> Option<u32> {
        self.user(wanted).map(|user| user.uid)
    }

    /// The number of a group, from a name or a number.
    pub(crate) fn gid(&self, wanted: &str) -> Option<u32> {
        let by_name = self.group.lines().find_map(|line| {
            let [name, _, gid, _] = fields(line)?;
            (name == wanted).then(|| gid.parse().ok())?
        });
        by_name.or_else(|| wanted.parse().ok())
    }

    /// The name of a user, or the number as text.
    pub(crate) fn user_name(&self, uid: u32) -> String {
        let name = self.passwd.lines().find_map(|line| {
            let [name, _, number, ..] = fields::<7>(line)?;
            (number.parse() == Ok(uid)).then(|| name.to_owned())
        });
        name.unwrap_or_else(|| uid.to_string())
    }

    /// The name of a group, or the number as text.
    pub(crate) fn group_name(&self, gid: u32) -> String {
        let name = self.group.lines().find_map(|line| {
            let [name, _, number, _] = fields(line)?;
            (number.parse() == Ok(gid)).then(|| name.to_owned())
        });
        name.unwrap_or_else(|| gid.to_string())
    }
}

fn fields<const N: usize>(line: &str) -> Option<[&str; N]> {
    let fields: Vec<&str> = line.split(':').collect();
    fields.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1001::/home/ann:/bin/sh\n".to_owned(),
            group: "root:x:0:\nann:x:1001:\ndocker:x:27:bob,ann\nsudo:x:28:annette\n".to_owned(),
        }
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let ann = sample().user("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, ann.home.as_str(), &ann.groups[..]), (1000, 1001, "/home/ann", &[27][..]));
        assert_eq!(sample().user("1000").unwrap(), ann);
        let nobody = sample().user("4242").unwrap();
        assert_eq!((nobody.uid, nobody.gid, nobody.home.as_str()), (4242, 4242, "/"));
        assert_eq!(sample().user("bob"), None);
        assert_eq!(sample().user("broken"), None);
        assert_eq!(sample().user("-1"), None);
    }

    #[test]
    fn names_and_numbers_go_both_ways() {
        let accounts = sample();
        assert_eq!((accounts.uid("ann"), accounts.gid("docker"), accounts.gid("77")), (Some(1000), Some(27), Some(77)));
        assert_eq!((accounts.user_name(1000), accounts.user_name(5)), ("ann".to_owned(), "5".to_owned()));
        assert_eq!((accounts.group_name(27), accounts.group_name(6)), ("docker".to_owned(), "6".to_owned()));
        assert_eq!(accounts.gid("nobody"), None);
    }

    #[test]
    fn missing_databases_have_no_names() {
        let dir = tempfile::tempdir().unwrap();
        let none = Accounts::read(dir.path());
        assert_eq!((none.user("root"), none.user_name(0)), (None, "0".to_owned()));
    }
}
