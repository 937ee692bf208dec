"""Around every job's work: checks of settings, errors as one sentence, whole files, records, processes."""

from __future__ import annotations

from scripts.run.checks import (
    RUN_KEYS,
    begin,
    check_count,
    check_crop,
    check_device,
    check_size,
    check_spacing,
    read_keys,
    refuse_unknown_keys,
)
from scripts.run.errors import (
    InputError,
    Interrupted,
    as_flag,
    is_disk_full,
    report_input_errors,
)
from scripts.run.files import (
    check_writable,
    file_sha256,
    folder_named,
    remove_unfinished,
    replacing,
)
from scripts.run.output_folder import claim_folder, share_folder
from scripts.run.processes import (
    data_parallel,
    gathered,
    hold_others,
    is_first,
    joined_shares,
    local_device,
    mean_over_ranks,
    n_processes,
    release_others,
    share_for_each,
    share_of_rank,
    start_processes,
    stop_processes,
    wait_for_all,
)
from scripts.run.progress import LossBar, ScanBar
from scripts.run.record import (
    METADATA,
    RunRecord,
    bundle_version,
    command_line,
    config_sha256,
)

__all__ = [
    "InputError",
    "Interrupted",
    "LossBar",
    "METADATA",
    "RUN_KEYS",
    "RunRecord",
    "ScanBar",
    "as_flag",
    "begin",
    "bundle_version",
    "check_count",
    "check_crop",
    "check_device",
    "check_size",
    "check_spacing",
    "check_writable",
    "claim_folder",
    "command_line",
    "config_sha256",
    "data_parallel",
    "file_sha256",
    "folder_named",
    "gathered",
    "hold_others",
    "is_disk_full",
    "is_first",
    "joined_shares",
    "local_device",
    "mean_over_ranks",
    "n_processes",
    "read_keys",
    "refuse_unknown_keys",
    "release_others",
    "remove_unfinished",
    "replacing",
    "report_input_errors",
    "share_folder",
    "share_for_each",
    "share_of_rank",
    "start_processes",
    "stop_processes",
    "wait_for_all",
]
