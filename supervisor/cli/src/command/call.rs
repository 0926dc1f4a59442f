//! `plugvisor call SERVICE/METHOD`: JSON in, JSON out, for any method of any plugin that brings its descriptors.
//!
//! The supervisor tells which plugin would serve the call and hands over its descriptor set; the call itself goes over
//! the socket of calls as any application's would.

use std::io::Read;
use std::time::Duration;

use plugvisor_proto::admin::v1::{GetStatusRequest, ResolveServiceRequest};
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use serde_json::Value;
use tonic::Request;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;

use crate::admin::{self, Admin, MARGIN, QUESTION};
use crate::args::{CallArgs, Format};
use crate::codec::DynamicCodec;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, json_options};

/// Without `--timeout`.
const USUAL: Duration = Duration::from_secs(30);

/// The largest message taken or sent; the broker has limits of its own.
const LARGEST_MESSAGE: usize = 64 * 1024 * 1024;

/// Makes the call and prints the answers.
pub(crate) async fn call(
    admin: &Admin,
    output: &Output,
    arguments: &CallArgs,
    timeout: Option<Duration>,
) -> Result<(), Failure> {
    let (service, method) = split(&arguments.method)?;
    let input = read_input(&arguments.json)?;
    let method = resolve(admin, service, method, arguments.token.as_deref().unwrap_or_default()).await?;
    let requests = requests(&method, &input)?;
    let socket = match &arguments.calls_socket {
        Some(socket) => socket.clone(),
        None => calls_socket(admin).await?,
    };
    let limit = timeout.unwrap_or(USUAL);
    let channel = admin::connect(&socket, limit).await?;
    let call = Call { method, requests, limit, token: arguments.token.as_deref() };
    let refused = |status: &tonic::Status| Failure::from_call(&arguments.method, &socket, status);
    // The broker and the plugin hold the deadline too; this is for a supervisor that hangs.
    match tokio::time::timeout(limit + MARGIN, call.run(channel, output, refused)).await {
        Ok(result) => result,
        Err(_) => Err(Failure::timeout(&arguments.method)),
    }
}

/// `package.Service/Method`, with or without a slash in front.
fn split(method: &str) -> Result<(&str, &str), Failure> {
    let (service, name) = method.strip_prefix('/').unwrap_or(method).split_once('/').unwrap_or((method, ""));
    if service.is_empty() || name.is_empty() || name.contains('/') {
        return Err(Failure::new(
            Outcome::Usage,
            format!("{method:?} is not a method"),
            "write package.Service/Method, such as plugvisor.examples.markdown.v1.MarkdownService/Render",
        ));
    }
    Ok((service, name))
}

/// The text of `--json`: itself, a file's, or standard input's.
fn read_input(argument: &str) -> Result<String, Failure> {
    let failed = |from: &str, error: &dyn std::fmt::Display| {
        Failure::new(
            Outcome::Usage,
            format!("cannot read the request from {from}: {error}"),
            "give --json the JSON itself, @FILE, or - for standard input",
        )
    };
    if argument == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(|error| failed("standard input", &error))?;
        return Ok(text);
    }
    match argument.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).map_err(|error| failed(path, &error)),
        None => Ok(argument.to_owned()),
    }
}

/// The method's types, from the plugin that would serve it.
async fn resolve(admin: &Admin, service: &str, method: &str, token: &str) -> Result<MethodDescriptor, Failure> {
    let question = ResolveServiceRequest { service: service.to_owned(), token: token.to_owned() };
    let answer = admin
        .ask(&format!("find {service}"), QUESTION, question, |mut client, question| async move {
            client.resolve_service(question).await
        })
        .await?;
    let plugin = answer.plugin;
    if answer.descriptor_set.is_empty() {
        return Err(Failure::new(
            Outcome::Failed,
            format!("{plugin} has no descriptor set, so JSON cannot be turned into its messages"),
            "put the output of `protoc --include_imports --descriptor_set_out=descriptor.binpb` into its bundle",
        ));
    }
    let pool = DescriptorPool::decode(answer.descriptor_set.as_slice()).map_err(|error| {
        Failure::new(
            Outcome::Failed,
            format!("the descriptor set of {plugin} is broken: {error}"),
            "make it with --include_imports, and tell the plugin's author",
        )
    })?;
    let descriptor = pool.get_service_by_name(service).ok_or_else(|| {
        let known: Vec<String> = pool.services().map(|service| service.full_name().to_owned()).collect();
        Failure::new(
            Outcome::NotFound,
            format!("{plugin} serves {service}, but its descriptor set has only: {}", known.join(", ")),
            "tell the plugin's author",
        )
    })?;
    descriptor.methods().find(|candidate| candidate.name() == method).ok_or_else(|| {
        let known: Vec<String> = descriptor.methods().map(|method| method.name().to_owned()).collect();
        Failure::new(
            Outcome::NotFound,
            format!("{service} of {plugin} has no method {method}"),
            format!("its methods are: {}", known.join(", ")),
        )
    })
}

async fn calls_socket(admin: &Admin) -> Result<std::path::PathBuf, Failure> {
    let answer = admin
        .ask("status", QUESTION, GetStatusRequest {}, |mut client, question| async move {
            client.get_status(question).await
        })
        .await?;
    let named = answer.supervisor.map(|supervisor| supervisor.calls_socket).filter(|path| !path.is_empty());
    // The two sockets stand in one directory.
    Ok(named.map_or_else(|| admin.socket.with_file_name("calls.sock"), Into::into))
}

/// The messages to send: one, or those of an array or of several documents when the method takes a stream.
fn requests(method: &MethodDescriptor, text: &str) -> Result<Vec<DynamicMessage>, Failure> {
    let input = method.input();
    let wrong = |error: &serde_json::Error| {
        Failure::new(
            Outcome::Usage,
            format!("the request is not a {}: {error}", input.full_name()),
            format!("its fields are: {}", fields(&input)),
        )
    };
    let mut messages = Vec::new();
    for document in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
        let document = document.map_err(|error| wrong(&error))?;
        let members = match document {
            Value::Array(members) if method.is_client_streaming() => members,
            document => vec![document],
        };
        for member in members {
            messages.push(DynamicMessage::deserialize(input.clone(), member).map_err(|error| wrong(&error))?);
        }
    }
    if messages.len() != 1 && !method.is_client_streaming() {
        return Err(Failure::new(
            Outcome::Usage,
            format!("{} takes one request, and {} were given", method.name(), messages.len()),
            "give one JSON object to --json",
        ));
    }
    Ok(messages)
}

/// Such as `text (string), width (uint32)`.
fn fields(message: &prost_reflect::MessageDescriptor) -> String {
    let fields: Vec<String> =
        message.fields().map(|field| format!("{} ({:?})", field.json_name(), field.kind())).collect();
    if fields.is_empty() { "none".to_owned() } else { fields.join(", ") }
}

struct Call<'a> {
    method: MethodDescriptor,
    requests: Vec<DynamicMessage>,
    limit: Duration,
    token: Option<&'a str>,
}

impl Call<'_> {
    async fn run(
        self,
        channel: Channel,
        output: &Output,
        refused: impl Fn(&tonic::Status) -> Failure,
    ) -> Result<(), Failure> {
        let mut grpc =
            Grpc::new(channel).max_decoding_message_size(LARGEST_MESSAGE).max_encoding_message_size(LARGEST_MESSAGE);
        grpc.ready().await.map_err(|error| refused(&tonic::Status::from_error(Box::new(error))))?;
        let codec = DynamicCodec::new(self.method.output());
        let path = format!("/{}/{}", self.method.parent_service().full_name(), self.method.name());
        let path: PathAndQuery = path
            .parse()
            .map_err(|error| Failure::new(Outcome::Usage, format!("{path} cannot be a gRPC path: {error}"), ""))?;
        let mut request = Request::new(tokio_stream::iter(self.requests));
        request.set_timeout(self.limit);
        if let Some(token) = self.token {
            let token = token.parse().map_err(|_| {
                Failure::new(Outcome::Usage, format!("{token:?} cannot be a token"), "tokens are printable ASCII")
            })?;
            request.metadata_mut().insert("plugvisor-token", token);
        }
        if self.method.is_server_streaming() {
            let answer = grpc.streaming(request, path, codec).await.map_err(|status| refused(&status))?;
            let mut messages = answer.into_inner();
            while let Some(message) = messages.message().await.map_err(|status| refused(&status))? {
                output.json_line(&to_json(&message)?)?;
            }
            return Ok(());
        }
        let answer = grpc.client_streaming(request, path, codec).await.map_err(|status| refused(&status))?;
        let value = to_json(&answer.into_inner())?;
        if output.format == Format::Jsonl { output.json_line(&value) } else { output.json(&value) }
    }
}

fn to_json(message: &DynamicMessage) -> Result<Value, Failure> {
    // Field names in the plugin's own JSON are protobuf's usual lowerCamelCase.
    message.serialize_with_options(serde_json::value::Serializer, &json_options()).map_err(|error| {
        let name = message.descriptor_name();
        Failure::new(Outcome::Failed, format!("cannot show the answer, a {name}, as JSON: {error}"), "")
    })
}

/// A message's type, by name.
trait DescriptorName {
    fn descriptor_name(&self) -> String;
}

impl DescriptorName for DynamicMessage {
    fn descriptor_name(&self) -> String {
        prost_reflect::ReflectMessage::descriptor(self).full_name().to_owned()
    }
}
