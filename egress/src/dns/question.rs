//! One DNS message of a guest: what is asked, whether it may be, and the answers that need no name server. Pure.
//!
//! What is asked of a name server is a question of our own making: nothing of a guest's message but the name (and in `allow-all` the type)
//! leaves the host.

use std::net::Ipv4Addr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};

use crate::names::Name;

/// Bytes of a message over UDP that are sent at most, whatever the client says (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
/// EDNS option "extended error" (RFC 8914).
const EXTENDED_ERROR: u16 = 15;
/// Bytes of the text in it at most.
const MAX_TEXT: usize = 200;

/// A question of a guest.
#[derive(Clone, Debug)]
pub struct Question {
    id: u16,
    recursion_desired: bool,
    query: Query,
    /// The client's EDNS and the bytes that it takes over UDP.
    edns: Option<u16>,
}

/// What a question is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Addresses: what the policy is about.
    Addresses,
    /// Answered without anything: IPv6 addresses, since only IPv4 leaves the host, and HTTPS and SVCB, whose keys would hide names
    /// (ECH) and whose hints would pass by this resolver.
    Nothing,
    /// Anything else.
    Other,
}

/// Bytes are no question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoQuestion {
    /// Not worth an answer: less than a header, or an answer itself (two servers could answer each other without end).
    Silence,
    /// To be answered with this code.
    Answer(u16, ResponseCode),
}

impl Question {
    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoQuestion> {
        let Some((&[id_high, id_low, flags, ..], _)) = bytes.split_first_chunk::<12>() else {
            return Err(NoQuestion::Silence);
        };
        if flags & 0x80 != 0 {
            return Err(NoQuestion::Silence);
        }
        let id = u16::from_be_bytes([id_high, id_low]);
        let error = |code| NoQuestion::Answer(id, code);
        let message = Message::from_vec(bytes).map_err(|_| error(ResponseCode::FormErr))?;
        if message.metadata.message_type != MessageType::Query || message.metadata.op_code != OpCode::Query {
            return Err(error(ResponseCode::NotImp));
        }
        let [query] = message.queries.as_slice() else { return Err(error(ResponseCode::FormErr)) };
        if query.query_class() != DNSClass::IN {
            return Err(error(ResponseCode::Refused));
        }
        Ok(Self {
            id,
            recursion_desired: message.metadata.recursion_desired,
            query: query.clone(),
            edns: message.edns.as_ref().map(Edns::max_payload),
        })
    }

    /// The name as DNS writes it, for people.
    pub fn asked(&self) -> String {
        let mut text = self.query.name().to_ascii();
        text.truncate(text.floor_char_boundary(255));
        text
    }

    /// The name, if it is one of a host.
    pub fn name(&self) -> Option<Name> {
        Name::parse(self.query.name().to_ascii().as_bytes()).ok()
    }

    /// The type.
    pub fn record_type(&self) -> RecordType {
        self.query.query_type()
    }

    /// The question itself.
    pub fn query(&self) -> &Query {
        &self.query
    }

    /// What it is about.
    pub fn subject(&self) -> Subject {
        match self.query.query_type() {
            RecordType::A => Subject::Addresses,
            RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB => Subject::Nothing,
            _ => Subject::Other,
        }
    }

    /// An answer without records. `why` is for people, in an extended error.
    pub fn answer(&self, code: ResponseCode, why: Option<&str>) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.response_code = code;
        message.add_query(self.query.clone());
        if self.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_UDP);
            if let Some(why) = why {
                // 15: blocked.
                let text = why.get(..why.floor_char_boundary(MAX_TEXT)).unwrap_or_default();
                let data = [&15_u16.to_be_bytes()[..], text.as_bytes()].concat();
                edns.options_mut().insert(EdnsOption::Unknown(EXTENDED_ERROR, data));
            }
            message.set_edns(edns);
        }
        message
    }

    /// An answer with these addresses, all of the name that was asked for, each for `ttl` seconds.
    pub fn addresses(&self, addresses: &[Ipv4Addr], ttl: u32) -> Message {
        let mut message = self.answer(ResponseCode::NoError, None);
        for address in addresses {
            message.add_answer(Record::from_rdata(self.query.name().clone(), ttl, RData::A(A(*address))));
        }
        message
    }

    /// The message as it is sent over UDP: cut to a bare header that says so (TC) when it is longer than the client takes.
    pub fn datagram(&self, message: &Message) -> Option<Vec<u8>> {
        let most = self.edns.unwrap_or(512).clamp(512, MAX_UDP);
        let bytes = message.to_vec().ok()?;
        if bytes.len() <= usize::from(most) {
            return Some(bytes);
        }
        let mut cut = self.answer(message.metadata.response_code, None);
        cut.metadata.truncation = true;
        cut.to_vec().ok()
    }
}

/// The answer to what is no question.
pub fn error(id: u16, code: ResponseCode) -> Option<Vec<u8>> {
    Message::error_msg(id, OpCode::Query, code).to_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Name as DnsName;
    use proptest::prelude::*;

    fn ask(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(DnsName::from_ascii(name).unwrap(), kind));
        if let Some(most) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(most);
            message.set_edns(edns);
        }
        message.to_vec().unwrap()
    }

    #[test]
    fn a_question_is_read_and_answered() {
        let question = Question::parse(&ask("A.Example.com.", RecordType::A, None)).unwrap();
        assert_eq!(question.name(), Some(Name::parse(b"a.example.com").unwrap()));
        assert_eq!(question.subject(), Subject::Addresses);
        let bytes = question.datagram(&question.addresses(&[Ipv4Addr::new(1, 2, 3, 4)], 60)).unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        assert_eq!((answer.metadata.id, answer.metadata.message_type), (7, MessageType::Response));
        assert_eq!((answer.queries.len(), answer.answers.len()), (1, 1));
        assert!(answer.queries[0].name().to_ascii().starts_with("A.Example"), "the client's spelling is kept");
    }

    #[test]
    fn what_would_lead_past_us_is_answered_empty_and_other_types_are_known() {
        let subject = |kind| Question::parse(&ask("a.example.com.", kind, None)).unwrap().subject();
        for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
            assert_eq!(subject(kind), Subject::Nothing);
        }
        for kind in [
            RecordType::TXT,
            RecordType::NULL,
            RecordType::MX,
            RecordType::ANY,
            RecordType::CNAME,
            RecordType::Unknown(65400),
        ] {
            assert_eq!(subject(kind), Subject::Other);
        }
    }

    #[test]
    fn long_answers_are_cut_over_udp() {
        let many: Vec<Ipv4Addr> = (0..60).map(|i| Ipv4Addr::new(1, 2, 3, i)).collect();
        for (edns, cut) in [(None, true), (Some(1232), false), (Some(100), true), (Some(65535), false)] {
            let question = Question::parse(&ask("a.example.com.", RecordType::A, edns)).unwrap();
            let bytes = question.datagram(&question.addresses(&many, 60)).unwrap();
            let answer = Message::from_vec(&bytes).unwrap();
            assert_eq!((answer.metadata.truncation, answer.answers.is_empty()), (cut, cut), "{edns:?}");
            assert!(bytes.len() <= usize::from(MAX_UDP));
        }
    }

    #[test]
    fn a_refusal_says_why_to_those_who_know_edns() {
        let question = Question::parse(&ask("a.example.com.", RecordType::A, Some(1232))).unwrap();
        let answer = question.answer(ResponseCode::Refused, Some("no rule allows a.example.com"));
        let bytes = answer.to_vec().unwrap();
        assert!(bytes.windows(12).any(|w| w == b"rule allows "));
    }

    #[test]
    fn what_is_no_question_is_told_from_what_must_not_be_answered() {
        assert_eq!(Question::parse(&[0; 11]).unwrap_err(), NoQuestion::Silence);
        let mut answer = ask("a.b.", RecordType::A, None);
        answer[2] |= 0x80;
        assert_eq!(Question::parse(&answer).unwrap_err(), NoQuestion::Silence);
        let mut update = ask("a.b.", RecordType::A, None);
        update[2] |= 5 << 3;
        assert!(matches!(Question::parse(&update).unwrap_err(), NoQuestion::Answer(7, _)));
        let mut half = ask("a.b.", RecordType::A, None);
        half.truncate(14);
        assert_eq!(Question::parse(&half).unwrap_err(), NoQuestion::Answer(7, ResponseCode::FormErr));
        let mut none = ask("a.b.", RecordType::A, None);
        none[5] = 0;
        assert!(matches!(Question::parse(&none).unwrap_err(), NoQuestion::Answer(7, _)));
    }

    proptest! {
        #[test]
        fn a_strangers_bytes_never_panic_and_answers_answer_the_question(
            mut bytes in prop::collection::vec(any::<u8>(), 0..120),
            keep in 0_usize..40,
        ) {
            let real = ask("a.example.com.", RecordType::A, Some(1232));
            bytes.splice(0..0, real[..keep.min(real.len())].iter().copied());
            if let Ok(question) = Question::parse(&bytes) {
                let sent = question.datagram(&question.addresses(&[Ipv4Addr::LOCALHOST], 1)).unwrap();
                let answer = Message::from_vec(&sent).unwrap();
                prop_assert_eq!(answer.metadata.id.to_be_bytes(), [bytes[0], bytes[1]]);
                prop_assert_eq!(answer.queries.first(), Some(question.query()));
            }
        }
    }
}
