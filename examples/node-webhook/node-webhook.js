#!/usr/bin/node
// Forwards every event to WEBHOOK_URL. Node's own modules only, one event per connection.
"use strict";
const fs = require("fs");
const https = require("https");
const net = require("net");

const path = process.env.PLUGIN_SOCKET;
const ca = process.env.CA_FILE ? fs.readFileSync(process.env.CA_FILE) : undefined;

function post(request) {
  return new Promise((resolve) => {
    const { _meta, ...fields } = request.params;
    const body = JSON.stringify({ event: request.method, ...fields });
    const headers = { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) };
    // The id of the event stays the same when it is delivered again: the other side can drop the second copy.
    if (_meta && _meta.id) headers["Idempotency-Key"] = String(_meta.id);
    const signal = AbortSignal.timeout(6000); // all of it: an event has ten seconds
    const outgoing = https.request(process.env.WEBHOOK_URL, { method: "POST", headers, ca, signal }, (answer) => {
      answer.resume();
      const again = answer.statusCode >= 500 || [408, 425, 429].includes(answer.statusCode);
      const status = answer.statusCode < 300 ? "ok" : again ? "retry" : "rejected";
      answer.on("end", () => resolve({ status, message: `webhook answered ${answer.statusCode}` }));
    });
    outgoing.on("error", (error) => resolve({ status: "retry", message: error.message }));
    outgoing.end(body);
  });
}

const server = net.createServer((connection) => {
  let line = "";
  let taken = false;
  connection.setEncoding("utf8");
  connection.on("error", () => {});
  connection.on("data", async (chunk) => {
    line += chunk;
    if (taken || !line.includes("\n")) return;
    taken = true;
    try {
      const request = JSON.parse(line);
      const result = await post(request).catch((error) => {
        console.error(error); // whatever went wrong, the event comes again later
        return { status: "retry", message: error.message };
      });
      connection.end(JSON.stringify({ jsonrpc: "2.0", id: request.id, result }) + "\n");
    } catch (error) {
      console.error(error);
      connection.destroy();
    }
  });
});
fs.rmSync(path, { force: true });
server.listen(path);
