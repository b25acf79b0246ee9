"""The log files to the byte, averaging, and which writers go where."""

import json
import sys
import tempfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given, strategies

from guided_diffusion import logger
from guided_diffusion.runtime import log_writers

LAUNCHER_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def test_csv_gets_a_column_per_key_in_the_order_of_first_sight(tmp_path):
    path = tmp_path / "progress.csv"
    logger.configure(str(tmp_path), ["csv"])
    assert path.read_text() == ""
    for row in (
        {"step": 0, "loss": 0.5},
        {"loss": None, "step": 1, "mse": np.float32(0.1), "grad_norm": 1e-9},
        {"step": np.int64(2), "note": "plain"},
        {"loss": th.tensor(0.25), "mse": np.array(3.0)},
    ):
        logger.logkvs(row)
        logger.dumpkvs()
    assert path.read_text() == (
        "loss,step,grad_norm,mse,note\n"  # new keys go last, sorted among themselves
        "0.5,0,,,\n"
        ",1,1e-09,0.1,\n"
        ",2,,,plain\n"
        "0.25,,,3.0,\n"
    )


def test_csv_goes_on_where_an_earlier_run_stopped(tmp_path):
    for row in ({"b": 1, "a": 2}, {"a": 3}, {"c": 4, "a": "x,y\nz"}):
        log_writers.CSVOutputFormat(str(tmp_path / "progress.csv")).writekvs(row)
    assert (tmp_path / "progress.csv").read_text() == 'a,b,c\n2,1,\n3,,\n"x,y\nz",,4\n'
    assert [path.name for path in tmp_path.iterdir()] == ["progress.csv"]


def test_json_has_one_object_per_line_in_the_order_of_logging(tmp_path):
    logger.configure(str(tmp_path), ["json"])
    logger.logkvs({"step": 3, "loss": np.float32(0.5), "acc": th.tensor(0.75), "name": "x"})
    logger.dumpkvs()
    logger.logkv("a", 1.5)
    logger.dumpkvs()
    assert (tmp_path / "progress.json").read_text() == (
        '{"step": 3, "loss": 0.5, "acc": 0.75, "name": "x"}\n{"a": 1.5}\n'
    )


def test_tables_are_sorted_aligned_and_cut_at_30_characters(tmp_path):
    logger.configure(str(tmp_path), ["log"])
    logger.log("a line", 3, None)
    logger.logkvs(
        {
            "step": 12000,
            "Loss": th.tensor(0.123456),
            "grad_norm": np.float64(1e-9),
            "k" * 40: "v" * 31,
            "k" * 30: "v" * 30,
        }
    )
    logger.dumpkvs()
    logger.dumpkvs()
    rule = "-" * 67
    assert (tmp_path / "log.txt").read_text() == (
        f"Logging to {tmp_path}\n"
        "a line 3 None\n"
        f"{rule}\n"
        "| grad_norm                      | 1e-09                          |\n"
        "| kkkkkkkkkkkkkkkkkkkkkkkkkkk... | vvvvvvvvvvvvvvvvvvvvvvvvvvv... |\n"
        "| kkkkkkkkkkkkkkkkkkkkkkkkkkkkkk | vvvvvvvvvvvvvvvvvvvvvvvvvvvvvv |\n"
        "| Loss                           | 0.123                          |\n"
        "| step                           | 1.2e+04                        |\n"
        f"{rule}\n"
        "WARNING: there are no values to write\n"
    )


def test_narrow_tables_are_as_wide_as_their_longest_cell(tmp_path):
    with open(tmp_path / "table.txt", "w") as file:
        table = log_writers.HumanOutputFormat(file)
        table.writekvs({"b": 0.5, "step": "x"})
        table.close()
        assert not file.closed
    assert (tmp_path / "table.txt").read_text() == (
        "-------------------\n| b    | 0.5      |\n| step | x        |\n-------------------\n"
    )
    with pytest.raises(TypeError, match="filename_or_file is 3: give a file name or an open text stream"):
        log_writers.HumanOutputFormat(3)


def test_tensorboard_curves_are_drawn_over_the_real_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger.configure(str(tmp_path), ["tensorboard"])
    for row in ({"step": 100, "loss": 0.5, "note": "no number"}, {"step": 250, "loss": th.tensor(0.25)}, {"loss": 1}):
        logger.logkvs(row)
        logger.dumpkvs()
    logger.get_current().close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "step"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(100, 0.5), (250, 0.25), (251, 1.0)]


def test_wandb_gets_numbers_and_the_real_step(monkeypatch, tmp_path):
    rows = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: rows.append((numbers, step)), finish=lambda: rows.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda dir: rows.append(dir) or run))
    with logger.scoped_configure(str(tmp_path), ["wandb"]):
        for row in ({"loss": np.float32(0.5), "note": "x"}, {"step": 40, "loss": 2}):
            logger.logkvs(row)
            logger.dumpkvs()
    assert rows == [str(tmp_path), ({"loss": 0.5}, 1), ({"loss": 2.0, "step": 40.0}, 40), "end"]


def test_formats_that_are_unknown_or_not_installed_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown log format 'cvs': choose from stdout, log, json, csv, tensorboard"):
        logger.make_output_format("cvs", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=f"log format '{name}' needs a package: run `pip install {name}`"):
            logger.configure(str(tmp_path), [name])


@given(strategies.lists(strategies.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_logkv_mean_is_the_mean_since_the_last_dump(values):
    collected = logger.Logger("", [])
    for _ in range(2):
        for value in values:
            collected.logkv_mean("x", value)
        assert collected.dumpkvs()["x"] == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
        assert collected.dumpkvs() == {}


def test_means_over_ranks_are_weighted_by_how_many_values_each_had(capsys):
    def mean_on(rank, rows):
        comm = types.SimpleNamespace(rank=rank, gather=lambda own: rows if rank == 0 else None)
        return logger.mpi_weighted_mean(comm, rows[rank])

    rows = [{"loss": (1.0, 3), "name": ("x", 1)}, {"loss": (5.0, 1), "only": (2, 2), "name": ("y", 1)}]
    assert mean_on(0, rows) == {"loss": 2.0, "only": 2.0}
    assert capsys.readouterr().err.count("no mean of name over ranks") == 2
    assert mean_on(1, rows) == {}


def test_a_communicator_makes_every_dump_an_average(tmp_path):
    other = {"loss": (5.0, 1), "lr": (0.5, 1)}
    first = types.SimpleNamespace(rank=0, gather=lambda own: [own, other])
    logger.configure(str(tmp_path), ["json"], comm=first)
    for loss in (0.0, 1.0, 2.0):
        logger.logkv_mean("loss", loss)
    logger.logkv("lr", 0.5)
    assert logger.dumpkvs() == {"loss": 2.0, "lr": 0.5}
    logger.set_comm(types.SimpleNamespace(rank=1, gather=lambda own: None))
    logger.logkv("loss", 1.0)
    assert logger.dumpkvs() == {"dummy": 1}
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"loss": 2.0, "lr": 0.5}, {"dummy": 1}]


def test_the_originals_names_work_on_the_current_row(tmp_path):
    logger.configure(str(tmp_path), [])
    logger.record_tabular("a", 1)
    logger.logkv("a", 2)
    logger.logkv_mean("b", 4.0)
    assert dict(logger.getkvs()) == {"a": 2, "b": 4.0}
    assert logger.dump_tabular() == {"a": 2, "b": 4.0}
    assert dict(logger.getkvs()) == {}


def test_profiling_adds_up_seconds_per_scope_and_survives_errors(tmp_path):
    logger.configure(str(tmp_path), [])

    @logger.profile("f")
    def double(x):
        """Twice."""
        return 2 * x

    assert (double(3), double(x=4), double.__doc__) == (6, 8, "Twice.")
    first = logger.getkvs()["wait_f"]
    with pytest.raises(KeyError), logger.profile_kv("f"):
        {}["x"]
    assert logger.getkvs()["wait_f"] > first > 0


def test_lines_below_the_level_are_not_written(tmp_path):
    logger.configure(str(tmp_path), ["log"])
    speakers = (logger.debug, logger.info, logger.warn, logger.error)
    for level in (logger.DEBUG, logger.WARN, logger.DISABLED):
        logger.set_level(level)
        for speak in speakers:
            speak(level, speak.__name__)
    assert (tmp_path / "log.txt").read_text().splitlines()[1:] == [
        *("10 debug", "10 info", "10 warn", "10 error"),
        *("30 warn", "30 error"),
    ]


def test_the_default_logger_comes_from_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "a" / "b"))
    logger.log("hello")
    assert logger.get_dir() == str(tmp_path / "a" / "b")
    assert logger.Logger.DEFAULT is logger.get_current()
    assert capsys.readouterr().out == f"Logging to {tmp_path}/a/b\nhello\n"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["log.txt", "progress.csv"]


@pytest.mark.parametrize("name", LAUNCHER_RANKS)
def test_ranks_above_0_write_only_their_own_text_log(monkeypatch, tmp_path, capsys, name):
    assert logger.get_rank_without_mpi_import() == 0
    monkeypatch.setenv(name, "12")
    assert logger.get_rank_without_mpi_import() == 12
    logger.configure(str(tmp_path), log_suffix="-x")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert [path.name for path in tmp_path.iterdir()] == ["log-x-rank012.txt"]
    assert capsys.readouterr().out == ""


def test_formats_per_rank_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,csv")
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "")
    logger.configure(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.csv", "progress.json"]
    monkeypatch.setenv("RANK", "1")
    logger.configure(str(tmp_path))
    assert logger.get_current().output_formats == []


def test_without_a_folder_each_run_gets_a_new_dated_one_unless_ranks_share_one(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_LOGDIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = []
    for _ in range(2):
        logger.configure(format_strs=[])
        folders.append(Path(logger.get_dir()))
    assert folders[0] != folders[1]
    for folder in folders:
        assert folder.is_dir()
        assert folder.parent == tmp_path
        logger.datetime.strptime(folder.name, "openai-%Y-%m-%d-%H-%M-%S-%f")
    monkeypatch.setattr(logger, "_shared_dir", None)
    logger.share_dir(str(tmp_path / "shared"))
    logger.configure(format_strs=[])
    assert logger.get_dir() == str(tmp_path / "shared")


def test_a_folder_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    logger.configure("~/logs", [])
    assert logger.get_dir() == str(tmp_path / "logs")


def test_scopes_nest_and_reset_goes_back_to_the_default(monkeypatch, tmp_path):
    logger.log("default")
    default = logger.get_current()
    logger.configure(str(tmp_path / "outer"), ["log"])
    outer = logger.get_current()
    with pytest.raises(KeyError), logger.scoped_configure(str(tmp_path / "inner"), ["log"]):
        logger.log("inside")
        {}["x"]
    assert logger.get_current() is outer
    logger.log("outside")
    logger.reset()
    assert logger.get_current() is default
    logger.reset()
    assert (tmp_path / "inner" / "log.txt").read_text() == f"Logging to {tmp_path}/inner\ninside\n"
    assert (tmp_path / "outer" / "log.txt").read_text() == f"Logging to {tmp_path}/outer\noutside\n"
    default_log = Path(default.get_dir(), "log.txt").read_text()
    assert default_log.splitlines()[-2:] == ["default", "Reset logger"]


def test_threads_that_configure_have_loggers_of_their_own_and_others_share_the_main_one(tmp_path):
    logger.configure(str(tmp_path / "main"), ["log"])
    everybody = threading.Barrier(3)  # so that none of the three takes the thread of another

    def work(name):
        if name != "idle":
            logger.configure(str(tmp_path / name), ["log"])
        everybody.wait(60)
        logger.log(f"from {name}")
        logger.logkv("x", name)
        return logger.get_dir(), dict(logger.getkvs())

    with ThreadPoolExecutor(3) as pool:
        found = {name: pool.submit(work, name) for name in ("one", "two", "idle")}
    for name, future in found.items():
        folder = "main" if name == "idle" else name
        assert future.result() == (str(tmp_path / folder), {"x": name})
        assert f"from {name}\n" in (tmp_path / folder / "log.txt").read_text()
    assert logger.get_dir() == str(tmp_path / "main")
    assert "one" not in (tmp_path / "main" / "log.txt").read_text()


def test_files_are_appended_to_and_never_emptied(tmp_path):
    for number in range(2):
        logger.configure(str(tmp_path))
        logger.log(number)
        logger.logkv("a", number)
        logger.dumpkvs()
    text = (tmp_path / "log.txt").read_text()
    assert [line for line in text.splitlines() if line in "01"] == ["0", "1"]
    assert (tmp_path / "progress.csv").read_text() == "a\n0\n1\n"


def test_rewinding_drops_what_will_be_written_again_and_rows_that_were_not_finished(tmp_path):
    logger.configure(str(tmp_path), ["csv", "json", "log"])
    for row in ({"loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 4, "note": "a\nb"}, {"step": 6}):
        logger.logkvs(row)
        logger.dumpkvs()
    for name, torn in (("progress.csv", "0.1,3"), ("progress.json", '{"step": 3')):
        with open(tmp_path / name, "a") as file:
            file.write(torn)
    table = (tmp_path / "log.txt").read_text()
    logger.rewind(4)
    assert (tmp_path / "progress.csv").read_text() == 'loss,step,note\n1.0,,\n0.5,2,\n,4,"a\nb"\n'
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 2, 4]
    logger.logkv("step", 5)
    logger.dumpkvs()
    logger.rewind(2)
    assert (tmp_path / "progress.csv").read_text() == "loss,step,note\n1.0,,\n0.5,2,\n"
    assert (tmp_path / "log.txt").read_text().startswith(table)
    logger.rewind(0)
    assert (tmp_path / "progress.csv").read_text() == "loss,step,note\n1.0,,\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "progress.csv", "progress.json"]


def test_rewinding_stands_damaged_lines(tmp_path):
    (tmp_path / "progress.json").write_text('rubbish\n[1]\n{"step": 9}\n')
    (tmp_path / "progress.csv").write_text("loss,step\n1\n\n1,nan\n1,9\n")
    logger.configure(str(tmp_path), ["csv", "json"])
    logger.rewind(3)
    assert (tmp_path / "progress.json").read_text() == "rubbish\n[1]\n"
    assert (tmp_path / "progress.csv").read_text() == "loss,step\n1\n\n1,nan\n"


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"log.txt cannot be written \(No space left on device\): make room"):
        logger.configure(str(tmp_path), ["log"])


def test_an_impossible_folder_is_answered_by_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run cannot be written \(Not a directory\): make room there, or choose"):
        logger.configure(dir=str(tmp_path / "file" / "run"))


def test_a_progress_bar_in_a_pipe_does_not_flood_it(capfd):
    for _ in logger.progress_bar(iterable=range(1000)):
        pass
    assert capfd.readouterr().err.count("1000") < 5
    with logger.progress_bar(shown=False, total=3) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""
