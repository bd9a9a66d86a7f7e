"""
The page in the browser: ``python -m deepinv_ud2m.app``, or ``deepinv-ud2m app``; see
:mod:`deepinv_ud2m.app`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from deepinv_ud2m import UD2M
from deepinv_ud2m.checkpoint import PRETRAINED

_LOCAL = ("127.0.0.1", "localhost", "::1")

# Browsers then load nothing from elsewhere, whatever a component of the page asks for.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="deepinv-ud2m app", description="A page in the browser.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind to (default: this computer alone)")
    add("--port", type=int, default=7860)
    add("--model", default="photos", help=f"of {', '.join(PRETRAINED)}, or a folder")
    add("--max-pixels", type=float, default=0.5, help="largest restored image, in megapixels (default: 0.5)")
    add("--max-seconds", type=float, default=600, help="longest job (default: 600)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name in ("max_pixels", "max_seconds"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Show the page until it is interrupted; returns the exit status."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="deepinv_ud2m_") as folder:
        # Before gradio is imported, which reads them then.
        os.environ |= {"GRADIO_TEMP_DIR": f"{folder}/gradio", "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import gradio as gr
            from starlette.middleware import Middleware
            from starlette.middleware.trustedhost import TrustedHostMiddleware

            from deepinv_ud2m.app.page import build

            page = build(UD2M.from_pretrained(args.model, device=args.device), args, Path(folder))
        except (ValueError, TypeError, OSError, ImportError) as error:
            hint = "; pip install 'deepinv_ud2m[app]'" if isinstance(error, ImportError) else ""
            print(f"error: {error}{hint}", file=sys.stderr)
            return 2
        middleware = [Middleware(Local)]
        if args.host in _LOCAL:
            # A page of elsewhere may give its name the address of this computer. The last is of "[::1]:7860".
            names = ["127.0.0.1", "localhost", "["]
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
        else:
            print(
                f"warning: whoever reaches {args.host} can use this page: it has no password", file=sys.stderr
            )
        print(f"the page is at http://{args.host}:{args.port}, until you press Ctrl-C", flush=True)
        try:
            page.launch(
                server_name=args.host, server_port=args.port, share=False, footer_links=[],
                max_file_size="50mb", app_kwargs={"middleware": middleware}, run_history=False, quiet=True,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )  # fmt: skip
        except OSError as error:  # such as a port in use
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


class Local:
    """Adds the header by which browsers load nothing from elsewhere (ASGI)."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = message | {"headers": [*message["headers"], policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


if __name__ == "__main__":
    sys.exit(main())
