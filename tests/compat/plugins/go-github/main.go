// Makes a release on GitHub of each deployment, with go-github.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/google/go-github/github"
)

type request struct {
	ID     json.RawMessage `json:"id"`
	Params map[string]any  `json:"params"`
}

func client() *github.Client {
	pem, err := os.ReadFile(os.Getenv("CA_FILE"))
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	made, err := github.NewEnterpriseClient("https://github.example.com:8443/", "https://github.example.com:8443/",
		&http.Client{Transport: transport, Timeout: 20 * time.Second})
	if err != nil {
		panic(err)
	}
	return made
}

func handle(hub *github.Client, event map[string]any) map[string]string {
	tag := fmt.Sprint(event["deployment_id"])
	made, _, err := hub.Repositories.CreateRelease(context.Background(), "me", fmt.Sprint(event["project_id"]),
		&github.RepositoryRelease{TagName: &tag})
	if err != nil {
		return map[string]string{"status": "retry", "detail": err.Error()}
	}
	return map[string]string{"status": "ok", "detail": made.GetHTMLURL()}
}

func main() {
	hub := client()
	os.Remove(os.Getenv("PLUGIN_SOCKET"))
	listener, err := net.Listen("unix", os.Getenv("PLUGIN_SOCKET"))
	if err != nil {
		panic(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			panic(err)
		}
		var asked request
		if line, err := bufio.NewReader(connection).ReadBytes('\n'); err == nil && json.Unmarshal(line, &asked) == nil {
			reply := map[string]any{"jsonrpc": "2.0", "id": asked.ID, "result": handle(hub, asked.Params)}
			json.NewEncoder(connection).Encode(reply)
		}
		connection.Close()
	}
}
