import subprocess
import sys

INGRESS = [
    "serve_app.ingress.api",
    "serve_app.ingress.auth",
    "serve_app.ingress.deployment",
    "serve_app.ingress.envelope",
    "serve_app.ingress.errors",
    "serve_app.ingress.middleware",
    "serve_app.ingress.replies",
    "serve_app.ingress.runpod",
    "serve_app.ingress.job_runner",
    "serve_app.ingress.runpod_jobs",
    "serve_app.ingress.runpod_view",
    "serve_app.app",
    "serve_app.job_types",
    "serve_app.validation.deployment",
    "serve_app.dispatch.deployment",
    "serve_app.inference.deployment",
]


HEAVY = {"torch", "diffusers", "transformers", "peft"}


def test_the_http_path_does_not_import_what_makes_pictures() -> None:
    code = f"import sys, {', '.join(INGRESS)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
