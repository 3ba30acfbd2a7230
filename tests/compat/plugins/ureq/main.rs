//! Posts each deployment to a room of Matrix, with ureq and rustls.

use serde_json::{json, Value};
use std::{env, fs, io::{BufRead, BufReader, Write}, os::unix::net::UnixListener, sync::Arc, time::Duration};

fn agent() -> ureq::Agent {
    let pem = fs::read(env::var("CA_FILE").unwrap()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pemfile::certs(&mut &pem[..]).unwrap() {
        roots.add(&rustls::Certificate(certificate)).unwrap();
    }
    let tls = rustls::ClientConfig::builder().with_safe_defaults().with_root_certificates(roots).with_no_client_auth();
    ureq::AgentBuilder::new().tls_config(Arc::new(tls)).timeout(Duration::from_secs(20)).build()
}

fn handle(agent: &ureq::Agent, event: &Value) -> Result<Value, Box<dyn std::error::Error>> {
    let id = event["deployment_id"].as_str().unwrap_or("");
    let url = format!("https://matrix.example.com:8443/rooms/1/send/m.room.message/{id}");
    let body = json!({"msgtype": "m.text", "body": format!("{} is live", event["url"])});
    let answer: Value = agent.put(&url).send_json(body)?.into_json()?;
    Ok(json!({"status": "ok", "detail": answer["event_id"]}))
}

fn main() {
    let (agent, path) = (agent(), env::var("PLUGIN_SOCKET").unwrap());
    let _ = fs::remove_file(&path);
    for connection in UnixListener::bind(&path).unwrap().incoming() {
        let mut connection = connection.unwrap();
        let mut line = String::new();
        if BufReader::new(&connection).read_line(&mut line).is_err() {
            continue;
        }
        let request: Value = match serde_json::from_str(&line) {
            Ok(request) => request,
            Err(_) => continue,
        };
        let result = handle(&agent, &request["params"])
            .unwrap_or_else(|error| json!({"status": "retry", "detail": error.to_string()}));
        let _ = writeln!(connection, "{}", json!({"jsonrpc": "2.0", "id": request["id"], "result": result}));
    }
}
