//! The way to the agent: a unix socket, or TCP with or without TLS; deadlines; and the wait for an answer.

use std::{error::Error, future::Future, io, path::Path, time::Duration};

use cdp_proto::{parse::Endpoint, v1::cdp_agent_client::CdpAgentClient};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{self, Certificate, Channel, ClientTlsConfig, Identity, Uri},
};

use crate::{args::Global, failure::Failure, progress};

/// The generated client.
pub type Client = CdpAgentClient<Channel>;

const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An `info` of a volume with very many markers is large; the answer is trusted to be ours, not to be small.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// A connected agent.
pub struct Agent {
    client: Client,
    endpoint: Endpoint,
    timeout: Option<Duration>,
    stream_timeout: Option<Duration>,
}

impl Agent {
    /// Connects, or says why not.
    pub async fn connect(global: &Global) -> Result<Agent, Failure> {
        let chosen = global.timeout.map(Duration::from_nanos);
        let timeout = Some(chosen.unwrap_or(TIMEOUT_DEFAULT)).filter(|limit| !limit.is_zero());
        let limit = timeout.map_or(CONNECT_TIMEOUT, |limit| limit.min(CONNECT_TIMEOUT));
        let channel = match time::timeout(limit, channel(global)).await {
            Ok(channel) => channel?,
            Err(_) => return Err(unreachable(&global.agent, format!("no connection within {limit:?}"))),
        };
        Ok(Agent {
            client: CdpAgentClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX),
            endpoint: global.agent.clone(),
            timeout,
            stream_timeout: chosen.filter(|limit| !limit.is_zero()),
        })
    }

    /// Whether paths given here mean the same on the agent's side.
    pub fn is_local(&self) -> bool {
        matches!(self.endpoint, Endpoint::Unix(_))
    }

    /// One call and its answer. A wait of more than a second shows on a terminal.
    pub async fn call<Q, A, F, W>(&self, what: impl Into<String>, question: Q, method: F) -> Result<A, Failure>
    where
        F: FnOnce(Client, Request<Q>) -> W,
        W: Future<Output = Result<Response<A>, Status>>,
    {
        let what = what.into();
        let answer = method(self.client.clone(), request(question, self.timeout));
        let answer = progress::spin(&what, within(self.timeout, answer)).await;
        answer.map(Response::into_inner).map_err(|status| self.failure(what, status))
    }

    /// A call that is answered by a stream. Only a --timeout that was given limits it, as a whole.
    pub async fn stream<Q, A, F, W>(
        &self,
        what: impl Into<String>,
        question: Q,
        method: F,
    ) -> Result<Answers<'_, A>, Failure>
    where
        F: FnOnce(Client, Request<Q>) -> W,
        W: Future<Output = Result<Response<Streaming<A>>, Status>>,
    {
        let what = what.into();
        let deadline = self.stream_timeout.map(|limit| time::Instant::now() + limit);
        let answer = method(self.client.clone(), request(question, self.stream_timeout));
        match within(self.stream_timeout.or(self.timeout), answer).await {
            Ok(stream) => Ok(Answers { agent: self, what, stream: stream.into_inner(), deadline }),
            Err(status) => Err(self.failure(what, status)),
        }
    }

    fn failure(&self, what: String, status: Status) -> Failure {
        // What the agent says has no cause on our side; a connection that broke has. So has one that never worked: with TLS 1.3 the
        // client learns only now that its certificate was refused.
        let codes = [Code::Unknown, Code::Unavailable, Code::Internal, Code::Cancelled];
        if let Some(cause) = Error::source(&status).filter(|_| codes.contains(&status.code())) {
            let hint = match self.endpoint {
                Endpoint::Https { .. } => " (does the agent accept this client's certificate? --tls-cert, --tls-key)",
                _ => "",
            };
            return unreachable(&self.endpoint, format!("{what}: {}{hint}", causes(cause)));
        }
        Failure::call(what, status)
    }
}

/// The answers of a stream, one by one.
pub struct Answers<'a, A> {
    agent: &'a Agent,
    what: String,
    stream: Streaming<A>,
    deadline: Option<time::Instant>,
}

impl<A> Answers<'_, A> {
    /// The next one; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<A>, Failure> {
        let next = match self.deadline {
            Some(deadline) => {
                time::timeout_at(deadline, self.stream.message()).await.unwrap_or_else(|_| Err(late(None)))
            }
            None => self.stream.message().await,
        };
        next.map_err(|status| self.agent.failure(self.what.clone(), status))
    }
}

/// Both ends stop at the deadline: the agent is told it, and a hung one does not hang us.
async fn within<A>(limit: Option<Duration>, answer: impl Future<Output = Result<A, Status>>) -> Result<A, Status> {
    match limit {
        Some(limit) => match time::timeout(limit, answer).await {
            Ok(Err(status)) if is_expiry(&status) => Err(late(Some(limit))),
            Ok(answer) => answer,
            Err(_) => Err(late(Some(limit))),
        },
        None => answer.await,
    }
}

/// The timers of the library, here and on the agent's side, end a call with CANCELLED; only the words tell.
fn is_expiry(status: &Status) -> bool {
    status.code() == Code::Cancelled && status.message() == tonic::TimeoutExpired(()).to_string()
}

fn late(limit: Option<Duration>) -> Status {
    let within = limit.map_or_else(|| "--timeout".to_owned(), |limit| format!("{limit:?} (--timeout)"));
    Status::deadline_exceeded(format!("no answer within {within}; the agent may still be at it"))
}

fn request<Q>(question: Q, limit: Option<Duration>) -> Request<Q> {
    let mut request = Request::new(question);
    if let Some(limit) = limit {
        request.set_timeout(limit);
    }
    request
}

async fn channel(global: &Global) -> Result<Channel, Failure> {
    let endpoint = &global.agent;
    let invalid = |error: transport::Error| Failure::Usage(format!("--agent {endpoint}: {}", causes(&error)));
    match endpoint {
        Endpoint::Unix(path) => {
            // The address is never looked up: the connector knows the way.
            let builder = tune(transport::Endpoint::from_static("http://agent.invalid"));
            let socket = path.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            });
            builder
                .connect_with_connector(connector)
                .await
                .map_err(|error| unreachable(endpoint, causes(&error) + hint(path)))
        }
        Endpoint::Http { .. } => {
            let builder = tune(transport::Endpoint::from_shared(endpoint.to_string()).map_err(invalid)?);
            builder.connect().await.map_err(|error| unreachable(endpoint, causes(&error)))
        }
        Endpoint::Https { .. } => {
            let builder = tune(transport::Endpoint::from_shared(endpoint.to_string()).map_err(invalid)?);
            let builder = builder.tls_config(tls(global)?).map_err(invalid)?;
            builder.connect().await.map_err(|error| unreachable(endpoint, causes(&error)))
        }
    }
}

fn tune(builder: transport::Endpoint) -> transport::Endpoint {
    builder
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
}

fn tls(global: &Global) -> Result<ClientTlsConfig, Failure> {
    let Some(ca) = &global.tls_ca else {
        return Err(Failure::Usage(format!(
            "--agent {}: https needs --tls-ca, the certificates that may sign the agent's",
            global.agent
        )));
    };
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem("--tls-ca", ca)?));
    if let (Some(cert), Some(key)) = (&global.tls_cert, &global.tls_key) {
        config = config.identity(Identity::from_pem(pem("--tls-cert", cert)?, pem("--tls-key", key)?));
    }
    Ok(config)
}

fn pem(option: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|source| Failure::io(format!("{option} {}", path.display()), source))
}

fn unreachable(endpoint: &Endpoint, why: String) -> Failure {
    Failure::Unreachable { endpoint: endpoint.to_string(), why }
}

fn hint(socket: &Path) -> &'static str {
    match std::fs::metadata(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            " (is cdp-agent running? --agent or CDP_AGENT names another socket)"
        }
        _ => "",
    }
}

/// An error and its causes, without saying the same thing twice. That it was the transport says nothing.
fn causes(error: &(dyn Error + 'static)) -> String {
    if let (true, Some(cause)) = (error.is::<transport::Error>(), error.source()) {
        return causes(cause);
    }
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
