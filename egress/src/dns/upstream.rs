//! One question to the host's name servers. Over UDP from a socket of its own, hence a fresh port, connected to the server, so that the kernel
//! drops what others send; over TCP when the answer was cut. What comes back is an answer only with our id and our question.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

/// Bytes of an answer over UDP that are asked for.
const MAX_UDP: u16 = 1232;
/// Bytes of an answer over TCP that are taken.
const MAX_TCP: usize = 16 << 10;
/// Times that the list of servers is gone through.
const ROUNDS: usize = 2;
/// Datagrams that are looked at for one question: the others are forged.
const MAX_DATAGRAMS: usize = 32;

/// No name server answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    /// There is none.
    #[error("the host has no name server")]
    None,
    /// The last one's failure.
    #[error("the name server {server} did not answer")]
    Failed {
        /// Which.
        server: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The question cannot be sent.
    #[error("the question cannot be encoded")]
    Encode,
}

/// Asks `servers` in turn, each for `within` at most.
pub(crate) async fn ask(servers: &[SocketAddr], query: &Query, within: Duration) -> Result<Message, UpstreamError> {
    let mut last = UpstreamError::None;
    for _ in 0..ROUNDS {
        for server in servers {
            let id = rand::random();
            let question = encode(id, query).ok_or(UpstreamError::Encode)?;
            let asked = tokio::time::timeout(within, ask_one(*server, &question, id, query)).await;
            match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(answer) => return Ok(answer),
                Err(source) => last = UpstreamError::Failed { server: *server, source },
            }
        }
    }
    Err(last)
}

fn encode(id: u16, query: &Query) -> Option<Vec<u8>> {
    let mut message = Message::new(id, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(MAX_UDP);
    message.set_edns(edns);
    message.to_vec().ok()
}

async fn ask_one(server: SocketAddr, question: &[u8], id: u16, query: &Query) -> io::Result<Message> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = [0; MAX_UDP as usize];
    for _ in 0..MAX_DATAGRAMS {
        let length = socket.recv(&mut buffer).await?;
        match answer(buffer.get(..length).unwrap_or_default(), id, query) {
            Some(message) if message.metadata.truncation => return ask_over_tcp(server, question, id, query).await,
            Some(message) => return Ok(message),
            None => {}
        }
    }
    Err(io::Error::other("only forged answers came"))
}

async fn ask_over_tcp(server: SocketAddr, question: &[u8], id: u16, query: &Query) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).await?;
    let length = usize::from(stream.read_u16().await?);
    if length > MAX_TCP {
        return Err(io::Error::other("the answer is too long"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    answer(&bytes, id, query).ok_or_else(|| io::Error::other("the answer is to another question"))
}

/// The message, if it answers our question.
fn answer(bytes: &[u8], id: u16, query: &Query) -> Option<Message> {
    let message = Message::from_vec(bytes).ok()?;
    let metadata = &message.metadata;
    let ours = metadata.id == id && metadata.message_type == MessageType::Response && metadata.op_code == OpCode::Query;
    let [asked] = message.queries.as_slice() else { return None };
    let same = asked.name() == query.name()
        && asked.query_type() == query.query_type()
        && asked.query_class() == query.query_class();
    (ours && same).then_some(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::ResponseCode;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, RData, Record, RecordType};

    fn query() -> Query {
        Query::query(Name::from_ascii("a.example.com.").unwrap(), RecordType::A)
    }

    fn reply(to: &[u8], address: [u8; 4]) -> Message {
        let mut message = Message::from_vec(to).unwrap();
        message.metadata.message_type = MessageType::Response;
        let name = message.queries[0].name().clone();
        message.add_answer(Record::from_rdata(name, 60, RData::A(A(address.into()))));
        message
    }

    /// A server that answers each datagram with what `respond` makes of it.
    async fn server(respond: fn(&[u8]) -> Vec<Vec<u8>>) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                for answer in respond(&buffer[..length]) {
                    socket.send_to(&answer, from).await.unwrap();
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn forged_answers_are_passed_over() {
        let address = server(|bytes| {
            let right = reply(bytes, [1, 2, 3, 4]);
            let mut other_id = reply(bytes, [6, 6, 6, 6]);
            other_id.metadata.id ^= 1;
            let mut other_name = reply(bytes, [6, 6, 6, 6]);
            other_name.queries[0].set_name(Name::from_ascii("b.example.com.").unwrap());
            let mut other_type = reply(bytes, [6, 6, 6, 6]);
            other_type.queries[0].set_query_type(RecordType::TXT);
            let mut no_answer = reply(bytes, [6, 6, 6, 6]);
            no_answer.metadata.message_type = MessageType::Query;
            let all = [other_id, other_name, other_type, no_answer, right];
            [vec![vec![1, 2, 3]], all.iter().map(|m| m.to_vec().unwrap()).collect()].concat()
        });
        let answer = ask(&[address.await], &query(), Duration::from_secs(5)).await.unwrap();
        assert_eq!(answer.answers[0].data, RData::A(A(Ipv4Addr::new(1, 2, 3, 4))));
    }

    #[tokio::test]
    async fn a_server_that_is_silent_is_passed_over_in_time() {
        let silent = server(|_| Vec::new()).await;
        let good = server(|bytes| vec![reply(bytes, [1, 2, 3, 4]).to_vec().unwrap()]).await;
        let within = Duration::from_millis(100);
        assert!(ask(&[silent, good], &query(), within).await.is_ok());
        let error = ask(&[silent], &query(), within).await.unwrap_err();
        assert!(matches!(error, UpstreamError::Failed { server, .. } if server == silent));
        assert!(matches!(ask(&[], &query(), within).await, Err(UpstreamError::None)));
    }

    #[tokio::test]
    async fn a_cut_answer_is_asked_for_over_tcp() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let socket = UdpSocket::bind(address).await.unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let mut cut = Message::from_vec(&buffer[..length]).unwrap();
            cut.metadata.message_type = MessageType::Response;
            cut.metadata.truncation = true;
            socket.send_to(&cut.to_vec().unwrap(), from).await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut question = vec![0; usize::from(stream.read_u16().await.unwrap())];
            stream.read_exact(&mut question).await.unwrap();
            let mut message = reply(&question, [1, 2, 3, 4]);
            message.metadata.response_code = ResponseCode::NoError;
            let bytes = message.to_vec().unwrap();
            stream.write_u16(bytes.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
        });
        let answer = ask(&[address], &query(), Duration::from_secs(5)).await.unwrap();
        assert_eq!(answer.answers.len(), 1);
    }
}
