"""Writes a new token into a file every ten seconds, valid for thirty, until the broker has ended."""

import base64
import hashlib
import hmac
import json
import os
import socket
import sys
import time

KEY = b"only for trying this out"    # in advanced.config, base64url-encoded
SCOPES = ["rabbitmq.configure:%2F/*", "rabbitmq.read:%2F/*", "rabbitmq.write:%2F/*"]


def encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def token():
    claims = {"sub": "worker", "aud": "rabbitmq", "scope": SCOPES, "exp": int(time.time()) + 30}
    parts = [{"alg": "HS256", "typ": "JWT", "kid": "demo"}, claims]
    signed = b".".join(encode(json.dumps(part).encode()) for part in parts)
    return signed + b"." + encode(hmac.digest(KEY, signed, hashlib.sha256))


file = sys.argv[1]
while True:
    # Written under another name and renamed, so that no reader gets a part of it.
    with open(f"{file}.new", "wb") as new:
        new.write(token())
    os.rename(f"{file}.new", file)
    print("renewed the token", flush=True)
    time.sleep(10)
    try:
        socket.getaddrinfo("rabbitmq", None)
    except OSError:
        break
