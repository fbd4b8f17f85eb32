//! The guest's questions, over UDP and TCP. Each is a task of the policy's era, so that none is answered under a policy that has ended.

use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

use super::question::{self, NoQuestion, Question, Subject};
use crate::control::types::{Mode, RefusalKind, Via};
use crate::counters::Refused;
use crate::rules::{Rule, Verdict};
use crate::sandbox::{Era, Sandbox};

/// Port that refusals name.
const PORT: u16 = 53;
/// Connections of a sandbox over TCP at once.
const CONNECTIONS: usize = 16;
/// Questions of one connection.
const MAX_QUESTIONS: usize = 100;
/// For the next question of a connection to come.
const IDLE: Duration = Duration::from_secs(10);
/// Bytes of a question at most.
const MAX_QUESTION: usize = 1232;
/// After a failed read or accept.
const PAUSE: Duration = Duration::from_millis(20);

/// Answers datagrams until the task is dropped.
pub(crate) async fn run_udp(sandbox: Arc<Sandbox>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut buffer = [0; MAX_QUESTION];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // What came back of an answer that nobody took is reported here; more serious errors come again.
                tracing::debug!(%error, "cannot receive a DNS question");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let era = sandbox.era();
        // Refused here, before a task is made of it.
        if let Err(refused) = sandbox.resolver.admit_question() {
            sandbox.refuse(era.rules.default_rule(), Via::Dns, &refused, Some(PORT));
            if let Ok(question) = Question::parse(buffer.get(..length).unwrap_or_default())
                && let Some(answer) = question.datagram(&question.answer(ResponseCode::Refused, Some(&refused.reason)))
            {
                let _ = socket.try_send_to(&answer, from);
            }
            continue;
        }
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        let (sandbox, socket) = (Arc::clone(&sandbox), Arc::clone(&socket));
        era.clone().spawn(async move {
            let answer = match Question::parse(&bytes) {
                Ok(question) => question.datagram(&answer(&sandbox, &era, &question).await),
                Err(NoQuestion::Silence) => None,
                Err(NoQuestion::Answer(id, code)) => question::error(id, code),
            };
            if let Some(answer) = answer {
                // The guest asks again when its queue was full.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

/// Answers connections until the task is dropped.
pub(crate) async fn run_tcp(sandbox: Arc<Sandbox>, listener: TcpListener) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a DNS connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // One more than that is closed at once.
        let Ok(permit) = Arc::clone(&free).try_acquire_owned() else { continue };
        let (sandbox, era) = (Arc::clone(&sandbox), sandbox.era());
        era.clone().spawn(async move {
            // A client that goes away or says nonsense is its own business.
            let _ = serve(&sandbox, &era, stream).await;
            drop(permit);
        });
    }
}

async fn serve(sandbox: &Sandbox, era: &Era, mut stream: TcpStream) -> std::io::Result<()> {
    for _ in 0..MAX_QUESTIONS {
        let mut bytes = Vec::new();
        let next = async {
            let length = usize::from(stream.read_u16().await?);
            if length > MAX_QUESTION {
                return Err(std::io::ErrorKind::InvalidData.into());
            }
            bytes.resize(length, 0);
            stream.read_exact(&mut bytes).await
        };
        tokio::time::timeout(IDLE, next).await??;
        let answer = match Question::parse(&bytes) {
            Ok(question) => match sandbox.resolver.admit_question() {
                Ok(()) => answer(sandbox, era, &question).await.to_vec().ok(),
                Err(refused) => {
                    sandbox.refuse(era.rules.default_rule(), Via::Dns, &refused, Some(PORT));
                    question.answer(ResponseCode::Refused, Some(&refused.reason)).to_vec().ok()
                }
            },
            Err(NoQuestion::Silence) => None,
            Err(NoQuestion::Answer(id, code)) => question::error(id, code),
        };
        let Some(answer) = answer else { return Ok(()) };
        let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        tokio::time::timeout(IDLE, stream.write_all(&framed)).await??;
    }
    Ok(())
}

/// The answer to a question, counted.
async fn answer(sandbox: &Sandbox, era: &Era, question: &Question) -> Message {
    match decide(sandbox, era, question).await {
        Ok((rule, message)) => {
            rule.tally.allow();
            message
        }
        Err((rule, refused, code)) => {
            sandbox.refuse(&rule, Via::Dns, &refused, Some(PORT));
            question.answer(code, Some(&refused.reason))
        }
    }
}

type Decision = Result<(Rule, Message), (Rule, Refused, ResponseCode)>;

async fn decide(sandbox: &Sandbox, era: &Era, question: &Question) -> Decision {
    let rules = &era.rules;
    let default = rules.default_rule();
    let asked = question.asked();
    let empty = || question.answer(ResponseCode::NoError, None);
    match rules.mode() {
        Mode::DenyAll => {
            let refused = Refused::new(RefusalKind::DeniedByMode, "the policy allows nothing").of(&asked);
            Err((default.clone(), refused, ResponseCode::Refused))
        }
        Mode::AllowAll => {
            if question.subject() == Subject::Nothing {
                return Ok((default.clone(), empty()));
            }
            match sandbox.resolver.forward(question.query()).await {
                Ok(theirs) => {
                    // Records only: what else their message says is between them and us.
                    let mut message = question.answer(theirs.metadata.response_code, None);
                    message.add_answers(theirs.answers).add_authorities(theirs.authorities);
                    Ok((default.clone(), message))
                }
                Err(refused) => Err((default.clone(), refused.of(&asked), ResponseCode::ServFail)),
            }
        }
        Mode::Custom => {
            let not_allowed = || {
                let refused = Refused::new(RefusalKind::NameNotAllowed, format!("no rule allows {asked}")).of(&asked);
                (default.clone(), refused, ResponseCode::NXDomain)
            };
            let name = question.name().ok_or_else(not_allowed)?;
            let (Verdict::Pass(rule) | Verdict::Change(rule, _)) = rules.name(&name) else { return Err(not_allowed()) };
            match question.subject() {
                // Of the name nothing is told but that it may be reached, which the guest knows.
                Subject::Nothing => Ok((rule, empty())),
                Subject::Other => {
                    let reason = format!("questions of type {} are not answered", question.record_type());
                    let refused = Refused::new(RefusalKind::QuestionType, reason).of(&name);
                    Err((rule, refused, ResponseCode::Refused))
                }
                Subject::Addresses => match sandbox.resolver.resolve(&name, rules).await {
                    Ok(found) => Ok((rule, question.addresses(&found.addresses, found.ttl))),
                    Err(refused) => {
                        let code = match refused.kind {
                            RefusalKind::NotResolved => ResponseCode::NXDomain,
                            RefusalKind::NotReachable => ResponseCode::ServFail,
                            _ => ResponseCode::Refused,
                        };
                        Err((rule, refused, code))
                    }
                },
            }
        }
    }
}
