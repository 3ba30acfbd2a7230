"use strict";
// One-shot deliveries of plugins in Node: a request and its reply on each connection.
const fs = require("fs"), net = require("net");

module.exports = function serve(handle) {
  const server = net.createServer((connection) => {
    let text = "", taken = false;
    connection.setEncoding("utf8");
    connection.on("error", () => {}); // who asked has gone: it asks again
    connection.on("data", async (chunk) => {
      text += chunk;
      if (taken || !text.includes("\n")) return;
      taken = true;
      const request = JSON.parse(text);
      const result = await handle(request.params).catch((error) => {
        console.error(error); // whatever went wrong, the event comes again later
        return { status: "retry", detail: String(error) };
      });
      connection.end(JSON.stringify({ jsonrpc: "2.0", id: request.id, result }) + "\n");
    });
  });
  fs.rmSync(process.env.PLUGIN_SOCKET, { force: true });
  server.listen(process.env.PLUGIN_SOCKET);
};
