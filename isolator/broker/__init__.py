"""The broker: DNS and outbound TCP for every cage."""
