"""The notifier in its cage, with pretend answers of Slack: pip install pytest-isolator, then sudo pytest here."""

URL = "https://hooks.slack.com/services/T0/B0/secret"
LIVE = {"project_id": "p1", "deployment_id": "d1", "url": "https://shop.example", "duration_ms": 1200}


def test_channel_is_told_what_is_live(sidecar, pretend_internet):
    pretend_internet.answer("POST", URL, text="ok")
    notifier = sidecar(config={"slack_webhook_url": URL, "channel": "#live"})
    assert notifier.send("deploy.completed", LIVE).ok
    (sent,) = pretend_internet.requests
    assert "p1 is live at https://shop.example after 1200 ms" in sent.body and "#live" in sent.body
    assert notifier.denials == []


def test_outage_of_slack_is_tried_again_and_a_refusal_is_not(sidecar, pretend_internet):
    pretend_internet.answer("POST", URL, status=503)
    pretend_internet.answer("POST", URL, status=404)
    notifier = sidecar(config={"slack_webhook_url": URL})
    assert notifier.send("deploy.completed", LIVE).outcome == "retry"
    assert notifier.send("deploy.completed", LIVE).outcome == "rejected"
