// Counts events by name in PLUGIN_STATE_DIR/NAME. Rust's standard library only, one event per connection.
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::{env, fs};

/// The raw value after the last `"key":` of a JSON line. Inside a string every quote is escaped, so a
/// payload cannot fake a key, and the top level's `id` is written after `params`.
fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let at = line.rfind(&format!("\"{key}\":"))? + key.len() + 3;
    let rest = line[at..].trim_start();
    Some(rest[..rest.find([',', '}'])?].trim_end().trim_matches('"'))
}

/// Adds one to the number in `file`; written aside and renamed, so that a kill leaves the old or the new.
fn count(file: &Path) -> Result<u64, Error> {
    let before = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0u64);
    let aside = file.with_extension("new");
    fs::File::create(&aside)?.write_all(format!("{}\n", before + 1).as_bytes())?;
    fs::rename(&aside, file)?;
    Ok(before + 1)
}

fn serve(mut connection: UnixStream, state: &Path) -> Result<(), Error> {
    let mut line = String::new();
    BufReader::new(&connection).take(4096).read_line(&mut line)?;
    let bad = || Error::new(ErrorKind::InvalidData, "not a request");
    let (method, id) = (value(&line, "method").ok_or_else(bad)?, value(&line, "id").ok_or_else(bad)?);
    if !method.chars().all(|c| c.is_ascii_lowercase() || c == '.') {
        return Err(bad());
    }
    let result = match count(&state.join(method.replace('.', "-"))) {
        Ok(total) => format!(r#"{{"status":"ok","count":{total}}}"#),
        Err(error) => {
            eprintln!("{method}: {error}"); // the event comes again later
            r#"{"status":"retry"}"#.to_string()
        }
    };
    println!("{method}: {result}");
    writeln!(connection, r#"{{"jsonrpc":"2.0","id":{id},"result":{result}}}"#)
}

fn main() -> Result<(), Error> {
    let path = env::var("PLUGIN_SOCKET").expect("PLUGIN_SOCKET is set by the host");
    let state = env::var("PLUGIN_STATE_DIR").expect("PLUGIN_STATE_DIR is set by the host");
    fs::remove_file(&path).or_else(|e| if e.kind() == ErrorKind::NotFound { Ok(()) } else { Err(e) })?;
    for connection in UnixListener::bind(&path)?.incoming() {
        if let Err(error) = serve(connection?, Path::new(&state)) {
            eprintln!("{error}");
        }
    }
    Ok(())
}
