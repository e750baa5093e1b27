"""Children and pods that others refuse are told in their words: Pod Security, admission webhooks, dead ones too."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from toka_operator.advice import ADVICE
from toka_operator.failures import explain_missing_pods

from tests.cluster.harness.api_only import ApiServer
from tests.cluster.harness.errors import CommandFailed
from tests.cluster.operating import Json, Operator, unrelated_objects


class _Refusing(BaseHTTPRequestHandler):
    """Denies every admission review."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        denial = {"uid": review["request"]["uid"], "allowed": False, "status": {"message": "not on a Monday"}}
        body = json.dumps({**review, "response": denial, "request": None}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def refusing_webhook(server: ApiServer) -> Iterator[str]:
    """A webhook that denies whatever it is asked about; yields its address."""
    pki = server.control.pki
    pki.issue("webhook", "/CN=webhook", ["IP:127.0.0.1"])
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.file("webhook.crt"), pki.file("webhook.key"))
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{listener.server_address[1]}/"
    listener.shutdown()
    listener.server_close()


def ask_webhook(operator: Operator, address: str, resource: str, group: str = "") -> None:
    """Have the API server ask it before a resource of the test's namespace is made."""
    authority = base64.b64encode(Path(operator.server.control.pki.file("ca.crt")).read_bytes()).decode()
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": operator.namespace}}
    rule = {"apiGroups": [group], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": [resource]}
    webhook = {
        "name": "calendar.example.com",
        "clientConfig": {"url": address, "caBundle": authority},
        "rules": [rule],
        "namespaceSelector": namespace,
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 2,
    }
    manifest = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    operator.server.apply({**manifest, "metadata": {"name": operator.namespace}, "webhooks": [webhook]})


def test_what_an_admission_webhook_refuses_or_does_not_answer_is_told_and_made_when_it_may(operator: Operator) -> None:
    operator.expected.append("rejected=")
    with refusing_webhook(operator.server) as address:
        ask_webhook(operator, address, "pods")
        operator.apply("chat")
        degraded = operator.wait_for_condition("chat", "Degraded", "True", "WebhookRefused")
        assert "not on a Monday" in degraded["message"]
        ask_webhook(operator, address, "statefulsets", "apps")
        operator.apply("other")
        degraded = operator.wait_for_condition("other", "Degraded", "True", "WebhookRefused")
        assert "StatefulSet other-" in degraded["message"]
        operator.wait_for_condition("other", "ConfigValid", "False", "ChildRejected")
    operator.wait_until_ready("chat")
    operator.apply("third")
    degraded = operator.wait_for_condition("third", "Degraded", "True", "WebhookFailed")
    assert 'failed calling webhook "calendar.example.com"' in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE['WebhookFailed']}.")
    operator.wait_for_condition("third", "ConfigValid", "True")
    operator.server.kubectl("delete", "validatingwebhookconfiguration", operator.namespace)
    operator.wait_until_ready("third")
    operator.wait_until_ready("other")


def take_all_node_ports(operator: Operator) -> list[str]:
    """Make Services of a thousand ports, then of fewer, until the API server has none left; return their names."""
    names: list[str] = []
    count = 1024
    while count:
        ports = [{"name": f"p{number}", "port": number + 1} for number in range(count)]
        manifest = {"metadata": {"name": f"filler-{len(names)}"}, "spec": {"type": "NodePort", "ports": ports}}
        try:
            operator.server.request("POST", f"/api/v1/namespaces/{operator.namespace}/services", manifest)
        except CommandFailed as error:
            if "range is full" not in str(error):
                raise
            count //= 2
        else:
            names.append(f"filler-{len(names)}")
    return names


def test_a_service_for_which_no_port_is_left_is_told_and_made_when_there_is(operator: Operator) -> None:
    """The API server answers 500, as it does when it is ill, and to this one object for as long as it takes."""
    operator.expected.append("rejected=")
    taken = take_all_node_ports(operator)
    operator.apply("chat", service={"type": "NodePort"})
    degraded = operator.wait_for_condition("chat", "Degraded", "True", "ChildFailed")
    assert "Service chat: 500 InternalError: " in degraded["message"]
    assert "range is full" in degraded["message"]
    assert degraded["message"].endswith(f"{ADVICE['ChildFailed']}.")
    operator.wait_for_condition("chat", "ConfigValid", "True")
    assert len(operator.sets("chat")) == 1, "the other children are made meanwhile"
    for name in taken:
        operator.delete("service", name)
    operator.wait_until_ready("chat")
    operator.wait_for_condition("chat", "Degraded", "False")


def test_pods_that_pod_security_refuses_have_the_words_by_which_they_are_known(operator: Operator) -> None:
    """No object of today makes such a pod, since `podTemplate` keeps to `restricted`; one of version 0.1 may have."""
    manifest: Json = unrelated_objects("chat", "x")["statefulset", "chat-x"]
    manifest["spec"]["replicas"] = 1
    manifest["spec"]["template"]["spec"]["containers"] = [
        {"name": "c", "image": "none", "securityContext": {"privileged": True}}
    ]
    operator.server.apply(manifest, namespace=operator.namespace)

    def refusals() -> list[Json]:
        events: list[Json] = json.loads(operator.kubectl("get", "events", "-o", "json"))["items"]
        return [event for event in events if event["reason"] == "FailedCreate"]

    failure = explain_missing_pods("chat-x", operator.wait_for(refusals, "the StatefulSet's event"))
    assert failure is not None
    assert failure.reason == "PodSecurityViolated"
    assert "privileged" in failure.message
