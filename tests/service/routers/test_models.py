"""`/v1/models`: models and their aliases."""

from service.engine.simulator import Simulator


def test_an_alias_names_a_model(serve, connect):
    client = connect(serve(Simulator(0, 0), aliases={"gpt-image-1": "simulator"}))
    assert [model.id for model in client.models.list()] == ["simulator", "gpt-image-1"]
    assert client.models.retrieve("gpt-image-1").id == "gpt-image-1"
    assert client.models.retrieve("simulator").decoder == "full"
    assert client.images.generate(prompt="a", model="gpt-image-1").data
