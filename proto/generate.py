"""Writes everything that is generated from the proto: Python code and the API reference.

``python proto/generate.py [ROOT]`` writes below ROOT, by default the project's
own root. ``tests/unit/test_linters.py`` compares the outcome with what is committed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.rpc import status_pb2

PROJECT = Path(__file__).resolve().parents[1]
PROTO = "peercred/v1/peer_credentials.proto"
REFERENCE = "docs/api-reference.md"

SYNTAX = (FileDescriptorProto.SYNTAX_FIELD_NUMBER,)
"""Where the comments of the file as a whole are: before its ``syntax`` line."""


def protoc(*arguments: str) -> None:
    """Run protoc, with the plugins that are installed beside this Python.

    Raises:
        subprocess.CalledProcessError: protoc failed; it has said why on stderr.

    """
    imports = Path(status_pb2.__file__).parents[2]
    scripts = Path(sys.executable).parent
    subprocess.run(
        [
            sys.executable,
            *("-m", "grpc_tools.protoc"),
            *("-I", str(PROJECT / "proto")),
            *("-I", str(imports)),
            *arguments,
            PROTO,
        ],
        check=True,
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
    )


def write_python(root: Path) -> None:
    """Write clients/peercred/v1 below `root`: messages, stubs, and their types."""
    clients = root / "clients"
    clients.mkdir(parents=True, exist_ok=True)
    protoc(
        f"--python_out={clients}",
        f"--grpc_python_out={clients}",
        f"--mypy_out=quiet:{clients}",
        f"--mypy_grpc_out=quiet:{clients}",
    )


def write_reference(root: Path) -> None:
    """Write docs/api-reference.md below `root`, from the proto's comments."""
    with TemporaryDirectory() as folder:
        descriptors = Path(folder, "descriptors")
        protoc(f"--descriptor_set_out={descriptors}", "--include_source_info")
        files = FileDescriptorSet.FromString(descriptors.read_bytes())
    reference = root / REFERENCE
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text("\n".join(Reference(files.file[0]).lines()))


class Reference:
    """A proto file as Markdown.

    A comment is found by the path of what it belongs to, in the terms of
    google/protobuf/descriptor.proto: field number, index, field number, index...
    """

    def __init__(self, file: FileDescriptorProto) -> None:
        self.file = file
        self.comments = {
            tuple(location.path): location for location in file.source_code_info.location
        }

    def lines(self) -> Iterator[str]:
        """Give the whole page, line by line."""
        yield "# API reference"
        yield ""
        yield f"Made from `proto/{PROTO}` by `./dev proto`; not edited by hand."
        yield "How to use it is told in [api.md](api.md)."
        yield ""
        yield from self.comment(SYNTAX)
        for index, service in enumerate(self.file.service):
            yield from self.service(service, (FileDescriptorProto.SERVICE_FIELD_NUMBER, index))
        for index, message in enumerate(self.file.message_type):
            path = (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, index)
            yield from self.message(message, message.name, path)
        for index, enum in enumerate(self.file.enum_type):
            yield from self.enum(enum, (FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, index))

    def comment(self, path: tuple[int, ...]) -> Iterator[str]:
        """Give what is said before `path`, and the blank line that ends it."""
        location = self.comments[path]
        for text in (*location.leading_detached_comments, location.leading_comments):
            if text:
                yield from (line.strip() for line in text.strip().splitlines())
                yield ""

    def cell(self, path: tuple[int, ...]) -> str:
        """Give what is said before `path` as one line."""
        return " ".join(self.comment(path)).strip()

    def service(self, service: ServiceDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        """Describe a service and its methods."""
        yield f"## Service {self.file.package}.{service.name}"
        yield ""
        yield from self.comment(path)
        for index, method in enumerate(service.method):
            yield f"### {method.name}"
            yield ""
            yield self.signature(method)
            yield ""
            yield from self.comment((*path, ServiceDescriptorProto.METHOD_FIELD_NUMBER, index))

    def signature(self, method: MethodDescriptorProto) -> str:
        """Link what goes in and what comes out."""
        request = ("stream of " if method.client_streaming else "") + self.link(method.input_type)
        response = ("stream of " if method.server_streaming else "") + self.link(method.output_type)
        return f"{request} → {response}"

    def message(self, message: DescriptorProto, name: str, path: tuple[int, ...]) -> Iterator[str]:
        """Describe a message by a table of its fields, then those declared inside it."""
        yield f"## {name}"
        yield ""
        yield from self.comment(path)
        if message.field:
            yield "| field | type | meaning |"
            yield "| --- | --- | --- |"
            for index, field in enumerate(message.field):
                kind = self.type(message, field)
                meaning = self.cell((*path, DescriptorProto.FIELD_FIELD_NUMBER, index))
                yield f"| `{field.name}` | {kind} | {meaning} |"
            yield ""
        for index, nested in enumerate(message.nested_type):
            nested_path = (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, index)
            yield from self.message(nested, f"{name}.{nested.name}", nested_path)

    def type(self, message: DescriptorProto, field: FieldDescriptorProto) -> str:
        """Name a field's type, and say whether it may be absent or repeated."""
        if field.type_name:
            name = self.link(field.type_name)
        else:
            name = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {name}"
        if field.proto3_optional:
            return f"optional {name}"
        if field.HasField("oneof_index"):
            return f"one of `{message.oneof_decl[field.oneof_index].name}`: {name}"
        return name

    def enum(self, enum: EnumDescriptorProto, path: tuple[int, ...]) -> Iterator[str]:
        """Describe an enum by a table of its values."""
        yield f"## {enum.name}"
        yield ""
        yield from self.comment(path)
        yield "| value | meaning |"
        yield "| --- | --- |"
        for index, value in enumerate(enum.value):
            meaning = self.cell((*path, EnumDescriptorProto.VALUE_FIELD_NUMBER, index))
            yield f"| `{value.name}` | {meaning} |"
        yield ""

    def link(self, type_name: str) -> str:
        """Name a message or enum, as a link if it is described on this page."""
        name = type_name.removeprefix(f".{self.file.package}.")
        if name == type_name:
            return type_name.removeprefix(".")
        return f"[{name}](#{name.lower().replace('.', '')})"


def main() -> None:
    """Write below the folder named on the command line, or below the project."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT
    write_python(root)
    write_reference(root)


if __name__ == "__main__":
    main()
