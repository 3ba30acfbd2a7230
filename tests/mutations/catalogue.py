"""Mutations: faults, of one line each, that somebody could make in a line that security rests on.

For each the tests are named that must fail with it. A mutation that no test notices is a promise without a proof.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """A text that stands once in a file, the one that takes its place, and the tests that notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """As FILE::TEST below ``tests``."""


def _mutations(file: str, *entries: tuple[str, str, str, str]) -> tuple[Mutation, ...]:
    return tuple(Mutation(name, file, old, new, tuple(tests.split())) for name, old, new, tests in entries)


_CAGE = "cage/test_cage.py::"
_HOLDS = "escape/test_ablation.py::test_the_whole_cage_holds_an_attempt"
_WALK = "collector/test_walk.py::"
_PATHS = "runners/test_paths.py::"

_SERVERS = "mcp/test_servers.py::"
_WAITS = "system/reload/test_what_waits.py::"

_CERTIFIED = (
    "authoring/test_certify.py::test_policy_takes_what_a_certifier_signed_or_this_host_has_made_and_nothing_else"
)

_BACKGROUND = "supervisor/test_background.py::"

MUTATIONS = (
    *_mutations(
        "isolator/supervisor/background.py",
        (
            "who computes stays in the foreground",
            "for plugin, debt in self._debts.items() if debt > BURST",
            "for plugin, debt in self._debts.items() if debt > 100",
            f"{_BACKGROUND}test_who_computes_goes_behind_until_it_has_rested",
        ),
        (
            "who was behind before a reload stays there for good",
            "for leaf, is_behind in self._states.items() if is_behind}",
            "for leaf, is_behind in self._states.items() if False}",
            f"{_BACKGROUND}test_another_cage_of_one_that_computes_is_behind_at_the_first_look",
        ),
        (
            "each cage of a plugin has a share of its own",
            'return leaf.rpartition(".")[0]',
            "return leaf",
            f"{_BACKGROUND}test_another_cage_of_one_that_computes_is_behind_at_the_first_look",
        ),
        (
            "all callers of runners have one share together",
            'return leaf.rpartition(".")[0]',
            'return leaf.partition(".")[0]',
            f"{_BACKGROUND}test_callers_of_runners_have_each_a_debt_of_their_own",
        ),
        (
            "a rest pays for a burst",
            "BURST, MOST = 0.025, 0.5",
            "BURST, MOST = 0.025, 0.03",
            f"{_BACKGROUND}test_who_computes_in_bursts_has_its_share_in_the_foreground_and_no_more",
        ),
    ),
    *_mutations(
        "isolator/supervisor/reload/reloader.py",
        (
            "a reload comes to rest while processes are exchanged",
            "async with daemon.services.exchanging:",
            "if daemon.services.exchanging:",
            f"{_WAITS}test_reload_waits_for_the_exchange_of_the_one_before",
        ),
        (
            "descriptors of strangers are closed by an exec",
            "                await daemon.runners.pause()\n",
            "                pass\n",
            "runners/test_reload.py::test_descriptor_that_takes_minutes_to_close_holds_up_no_reload",
        ),
    ),
    *_mutations(
        "host/cluster/fold.py",
        (
            "a host takes a plugin whose holder has written since",
            "        if claim.cited != expected.cited and claim.holder != self._host:\n",
            "        if False:\n",
            "cluster/test_fold.py::test_claim_counts_if_its_holder_has_written_nothing_since",
        ),
        (
            "anybody does the work of a plugin that another host holds",
            "        if lease is None or lease.holder != self._host:\n",
            "        if lease is None:\n",
            "cluster/test_fold.py::test_claim_counts_if_its_holder_has_written_nothing_since",
        ),
        (
            "a host changes an event type behind another's back",
            "        if entry.replaces != (known.digest if known is not None else \"\"):\n",
            "        if False:\n",
            "cluster/test_types.py::test_type_counts_if_it_replaces_what_it_was_compared_with_and_nobody_minds",
        ),
    ),
    *_mutations(
        "host/cluster/delivery/replies.py",
        (
            "what a host answers is shown though the log says otherwise",
            "(row.state not in FINAL or told.state == row.state)",
            "True",
            "cluster/test_replies.py::test_answer_changes_no_state_that_the_log_has",
        ),
    ),
    *_mutations(
        "host/cluster/delivery/places.py",
        (
            "events that were trimmed off the log are passed over in silence",
            "        unread.note(db, before, members_of(db), place)\n",
            "",
            "cluster/test_losses.py::test_holder_that_was_away_too_long_says_which_events_its_plugin_has_lost"
            " cluster/test_losses.py::test_own_copy_of_a_plugin_says_which_events_it_never_got",
        ),
    ),
    *_mutations(
        "isolator/registration/proposals.py",
        (
            "a policy's demand for a certificate is not looked at",
            "        if grant.certified and release is not None:\n",
            "        if False:\n",
            _CERTIFIED,
        ),
    ),
    *_mutations(
        "isolator/registration/certificates.py",
        (
            "whoever signs a certificate is a certifier",
            "        if verifies(key, signed, claim.signatures):\n",
            "        if claim.signatures:\n",
            _CERTIFIED,
        ),
    ),
    *_mutations(
        "host/composition/host.py",
        (
            "a new host serves callers before it knows what was held for it",
            "        self._lifecycle.take_over(state.starts)\n",
            "        self._lifecycle.take_over(state.starts)\n        await self._control.begin()\n",
            f"{_WAITS}test_new_host_serves_callers_once_it_knows_what_was_held_for_it",
        ),
        (
            "a connection is made for a host that has left",
            "        await self._break_connects_off()\n",
            "",
            f"{_WAITS}test_no_connection_is_made_for_a_host_that_has_left",
        ),
    ),
    *_mutations(
        "isolator/registration/registrar.py",
        (
            "an operator agrees to something else than was shown before a reload",
            "if carried.shown(candidate) != one.shown:",
            "if False:",
            f"{_WAITS}test_what_would_be_shown_otherwise_after_a_reload_has_expired",
        ),
    ),
    *_mutations(
        "isolator/supervisor/invocations.py",
        (
            "an invocation gets any descriptor as its standard input",
            "if not is_sealed(stdin):",
            "if False:",
            "system/test_taken_over.py::test_host_cannot_hand_an_invocation_a_way_out_of_its_cage",
        ),
    ),
    *_mutations(
        "host/mcp/servers.py",
        (
            "anybody with the role calls the tools of any server",
            "if plugin.effective is None or uid not in plugin.effective.callers:",
            "if plugin.effective is None:",
            f"{_SERVERS}test_user_who_is_not_named_is_refused",
        ),
        (
            "a tool that the policy does not grant is called",
            "if not self.granted(name)(tool):",
            "if False:",
            f"{_SERVERS}test_editor_of_either_era_sees_and_calls_granted_tools_alone",
        ),
        (
            "a tool that nobody has approved as it is is called",
            "if approved is None or not is_unchanged(approved, offered):",
            "if False:",
            f"{_SERVERS}test_tool_that_changes_or_is_renamed_is_blocked_until_approved",
        ),
        (
            "a call that waits for its server is sent though its tool has changed meanwhile",
            "session = await self._allowed(name, tool, uid)  # it may not be any more",
            "pass",
            f"{_SERVERS}test_call_that_waits_for_its_server_is_not_sent_once_it_is_cancelled_or_forbidden",
        ),
        (
            "one user's calls take all the memory that there is",
            ">= CALLS:",
            ">= 1 << 30:",
            f"{_SERVERS}test_user_with_too_many_calls_is_refused_and_others_are_served",
        ),
    ),
    *_mutations(
        "host/control/endpoints.py",
        (
            "any role may call tools",
            "return caller.may_call",
            "return True",
            f"{_SERVERS}test_user_who_is_not_named_is_refused",
        ),
        (
            "any role may call any verb",
            "return caller.role is not None and ROLES.index(caller.role) >= ROLES.index(spec.role)",
            "return caller.role is not None",
            "host/test_control.py::test_each_role_may_call_its_own_verbs_and_no_others",
        ),
    ),
    *_mutations(
        "isolator/collector/walk.py",
        (
            "a collector follows links",
            "return openat2(folder, name, os.O_RDONLY | flags)",
            "return os.open(name, os.O_RDONLY | flags, dir_fd=folder)",
            f"{_WALK}test_file_that_becomes_a_link_is_not_followed "
            f"{_WALK}test_folder_that_becomes_a_link_is_not_followed",
        ),
        (
            "a collector looks behind links",
            "info = os.stat(name, dir_fd=folder, follow_symlinks=False)",
            "info = os.stat(name, dir_fd=folder)",
            "registration/test_staging.py::test_links_within_the_folder_stay_links",
        ),
        (
            "a collector waits for a FIFO's writer",
            "_open(folder, name, path, os.O_NONBLOCK)",
            "_open(folder, name, path, 0)",
            f"{_WALK}test_file_that_becomes_a_fifo_is_not_waited_for",
        ),
        (
            "a collector copies what became something else",
            'if not stat.S_ISREG(info.st_mode):\n                    raise UsageError(path, "changed',
            'if False:\n                    raise UsageError(path, "changed',
            f"{_WALK}test_file_that_becomes_a_fifo_is_not_waited_for",
        ),
    ),
    *_mutations(
        "isolator/collector/paths.py",
        (
            "a user's run changes what the user may not change",
            "check_access(fd, os.W_OK | os.X_OK)",
            "pass",
            f"{_PATHS}test_folder_that_the_caller_may_not_change_is_not_changed_for_it",
        ),
        (
            "the right to search proves that to read",
            "if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:",
            "if False:",
            f"{_PATHS}test_descriptor_that_proves_no_right_to_read_is_refused",
        ),
        (
            "a file passes for one of another name",
            "if name != path:",
            "if False:",
            f"{_PATHS}test_descriptor_under_another_name_is_refused",
        ),
        (
            "a folder of root's is a user's to change",
            "if os.fstat(tree).st_uid == 0:",
            "if False:",
            f"{_PATHS}test_folder_of_roots_is_refused_whoever_may_change_it",
        ),
    ),
    *_mutations(
        "isolator/linux/own_view.py",
        (
            "a file of the same name passes for the one that was opened",
            "if not os.path.samestat(theirs, os.fstat(own)):",
            "if False:",
            "linux/test_own_view.py::test_folder_on_a_mount_that_the_service_lacks_is_refused",
        ),
    ),
    *_mutations(
        "isolator/launcher/enter.py",
        (
            "a folder is a standard stream",
            "if stat.S_ISDIR(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:",
            "if False:",
            "runners/test_hostile.py::test_stream_that_leads_to_files_is_refused",
        ),
    ),
    *_mutations(
        "isolator/supervisor/runners/runners.py",
        (
            "a stranger's descriptor is closed on the loop",
            "await self._closers.close(uid, [connection.detach()])",
            "connection.close()",
            "runners/test_hostile.py::test_descriptor_that_takes_minutes_to_close_holds_up_nobody",
        ),
    ),
    *_mutations(
        "isolator/reader/package.py",
        (
            "a name in a package leads out of it",
            'if {b"", b".", b".."} & set(parts):',
            "if False:",
            "authoring/test_packages.py::test_bad_package_is_refused_in_one_line_and_leaves_nothing",
        ),
        (
            "the digest of a package is not compared",
            "if size != len(text) or self._take(size) != text:",
            "if self._take(size) is None:",
            "authoring/test_packages.py::test_bad_package_is_refused_in_one_line_and_leaves_nothing",
        ),
    ),
    *_mutations(
        "isolator/registration/signatures.py",
        (
            "a publisher may publish any plugin",
            "if publisher in owners:",
            "if publisher:",
            "authoring/test_signatures.py::test_plugin_of_a_publisher_is_nobody_elses_to_publish",
        ),
        (
            "a signature is not verified",
            "public.verify(bytes.fromhex(signature), signed)",
            "pass",
            "authoring/test_signatures.py::test_plugin_of_a_publisher_is_nobody_elses_to_publish",
        ),
    ),
    *_mutations(
        "isolator/registration/collecting.py",
        (
            "staging keeps links that lead out by way of others",
            "self._check_link(root, path, goal)",
            "pass",
            "registration/test_staging.py::test_hostile_package_is_refused",
        ),
    ),
    *_mutations(
        "isolator/registration/staging.py",
        (
            "a registered binary may be another user's",
            "info.st_uid != 0\n",
            "False\n",
            "registration/test_staging.py::test_a_binary_that_others_can_change_is_refused",
        ),
    ),
    *_mutations(
        "isolator/registration/store.py",
        (
            "a staged copy is not synced before it is kept",
            "        sync_tree(staged.folder)\n",
            "",
            "registration/test_damaged_store.py::test_failed_write_of_a_copy_is_noticed_before_anything_refers_to_it",
        ),
    ),
    *_mutations(
        "isolator/supervisor/updates.py",
        (
            "approval of a version that was not shown",
            "if digest and digest != (now.pending or now.release).digest:",
            "if False:",
            "system/updates/test_approval.py::test_version_is_approved_only_as_it_was_shown",
        ),
        (
            "a host that takes another's place does not hear of a plugin that is added meanwhile",
            "            self._table.announce(plugin)  # the host that gets",
            "            # the host that gets",
            f"{_WAITS}test_plugin_whose_registration_outlasts_the_host_that_was_asked_is_known_to_the_next",
        ),
    ),
    *_mutations(
        "isolator/supervisor/host_link.py",
        (
            "a host hears too late of the plugins that its predecessor adds as it leaves",
            "[*known, *added]",
            "known",
            "supervisor/test_host_link.py"
            "::test_successor_knows_plugins_as_they_were_and_those_that_were_added_since",
        ),
    ),
    *_mutations(
        "isolator/supervisor/cage_spec.py",
        (
            "a pinned binary that has changed runs",
            "if found != release.binary_sha256:",
            "if False:",
            "system/updates/test_approval.py::test_a_binary_that_was_changed_runs_only_after_approval",
        ),
    ),
    *_mutations(
        "isolator/supervisor/reach.py",
        (
            "a folder in the place of the cage's own is taken for it",
            "if identity(os.fstat(folder)) == known:",
            "if known:",
            "supervisor/test_reach.py::test_folder_of_a_socket_is_found_in_the_root_of_the_process_alone",
        ),
        (
            "any pipe that pid 1 has is taken for the log",
            'if os.readlink(place := f"{folder}/{name}") == f"pipe:[{inode}]":',
            'if os.readlink(place := f"{folder}/{name}").startswith("pipe:"):',
            "supervisor/test_reach.py::test_pipe_of_another_process_with_the_pid_is_not_read",
        ),
    ),
    *_mutations(
        "isolator/supervisor/sidecar_socket.py",
        (
            "a socket of another owner is believed",
            " and info.st_uid == uid:",
            ":",
            "system/test_socket_swaps.py::test_socket_of_another_owner_is_refused",
        ),
        (
            "a socket behind a link is used",
            "fd = openat2(folder, SOCKET, os.O_PATH | os.O_NOFOLLOW)\n        except",
            "fd = os.open(SOCKET, os.O_PATH, dir_fd=folder)\n        except",
            "system/test_socket_swaps.py",
        ),
        (
            "a socket file is lent that was replaced meanwhile",
            "if (identity(now), now.st_ctime_ns) == (identity(before), before.st_ctime_ns):",
            "if now:",
            "supervisor/test_run_socket.py::test_socket_that_is_changed_while_it_is_lent_is_not",
        ),
    ),
    *_mutations(
        "host/delivery/lent_socket.py",
        (
            "a lent socket file is used whatever its name stands for by now",
            "if os.fstat(self._fd).st_ctime_ns == self._changed_ns:",
            "if self._fd >= 0:",
            "host/test_lent_socket.py::test_supervisor_is_asked_once_the_name_may_stand_for_something_else",
        ),
        (
            "a socket file that comes too late is used for another run",
            "if run == self._run and self._fd < 0 and fds:",
            "if self._fd < 0 and fds:",
            "host/test_lent_socket.py::test_answer_for_another_run_is_closed",
        ),
    ),
    *_mutations(
        "isolator/layers/filesystem.py",
        (
            "the daemon's folder in a cage can be written",
            "mount.set_attributes(fd, _SCRATCH | mount.RDONLY, recursive=False)",
            "mount.set_attributes(fd, _SCRATCH, recursive=False)",
            "escape/test_sentences.py::test_a_sentence_is_true_of_its_cage",
        ),
        (
            "the root of a cage can be written",
            "mount.set_attributes(root, mount.RDONLY | mount.NOSUID | mount.NODEV, recursive=False)",
            "mount.set_attributes(root, mount.NOSUID | mount.NODEV, recursive=False)",
            f"{_CAGE}test_an_exit_code",
        ),
    ),
    *_mutations(
        "isolator/layers/capabilities.py",
        (
            "the securebits stay open",
            "capability.set_securebits(_SECUREBITS)",
            "pass",
            "escape/test_sentences.py::test_a_sentence_is_true_of_its_cage",
        ),
        (
            "the securebits are not locked",
            "_NO_CAP_AMBIENT_RAISE | _LOCKS |",
            "_NO_CAP_AMBIENT_RAISE |",
            "escape/test_sentences.py::test_a_sentence_is_true_of_its_cage",
        ),
        (
            "the bounding set stays",
            "capability.drop_bounding_set(order.last_capability)",
            "pass",
            f"{_CAGE}test_an_exit_code",
        ),
    ),
    *_mutations(
        "isolator/layers/user.py",
        (
            "the launcher's groups come along",
            "os.setgroups([])",
            "os.setgroups([0])",
            f"{_CAGE}test_an_exit_code",
        ),
    ),
    *_mutations(
        "isolator/layers/landlock.py",
        (
            "Landlock is prepared and not entered",
            "        landlock.restrict_self(ruleset)\n",
            "        pass\n",
            "escape/test_sentences.py::test_landlock_is_a_second_wall",
        ),
    ),
    *_mutations(
        "isolator/layers/proc/drift.py",
        (
            "an entry of /proc that comes later is not looked for",
            " and self._watch.names(process) == self._names:",
            ":",
            "cage/test_drift.py::test_entry_of_proc_that_appears_later_is_noticed",
        ),
        (
            "what is mounted over a cover of /proc is not compared",
            "if found == self._made else",
            "if True else",
            "cage/test_drift.py::test_change_of_the_mounts_in_its_proc_is_noticed",
        ),
    ),
    *_mutations(
        "isolator/linux/mount_watch.py",
        (
            "mounts that have changed are called unchanged",
            "self._requests.pop(ended[0], None)",
            "pass",
            "cage/test_drift.py::test_change_of_the_mounts_in_its_proc_is_noticed",
        ),
        (
            "a watch outlasts its cage",
            "request[0].cancel(request[1])",
            "pass",
            "cage/test_drift.py::test_watch_keeps_a_namespace_until_it_ends_and_no_longer",
        ),
        (
            "a watch that has ended takes its room for ever",
            "self._hear(context)  # else",
            "pass  # else",
            "cage/test_drift.py::test_watch_has_no_bound_and_what_ends_gives_its_room_to_others",
        ),
    ),
    *_mutations(
        "isolator/layers/cgroup/layer.py",
        (
            "limits of a running cage are not read again",
            "if self._confirmed and all(read_raw(path) == found for path, found in self._confirmed.items()):",
            "if self._confirmed:",
            "cage/test_drift.py::test_change_of_each_limit_is_noticed_and_its_mending_too",
        ),
    ),
    *_mutations(
        "isolator/broker/flow.py",
        (
            "the first flow of a cage asks for no ticks",
            "            self._busy()\n",
            "            pass\n",
            "broker/test_ticks.py::test_first_flow_and_first_count_ask_for_ticks",
        ),
    ),
    *_mutations(
        "isolator/layers/proc/layer.py",
        (
            "/proc without covers",
            "        _cover()\n        os.chdir(",
            "        os.chdir(",
            "cage/test_figures.py::test_each_uuid_of_the_kernel_is_another",
        ),
        (
            "/proc shows processes of others",
            '_OPTIONS = "hidepid=invisible"',
            '_OPTIONS = "hidepid=off"',
            "escape/test_sentences.py::test_a_sentence_is_true_of_its_cage",
        ),
    ),
    *_mutations(
        "isolator/layers/namespaces.py",
        (
            "the control group's place on the host is seen",
            "ns.unshare(ns.CLONE_NEWCGROUP)",
            "pass",
            f"{_CAGE}test_an_exit_code",
        ),
    ),
    *_mutations(
        "isolator/layers/seccomp/profiles.py",
        (
            "clone makes namespaces",
            'yield from _either("clone", AnyBit(0, _CLONE_NEW), DENY, ALLOW)',
            'yield "clone", ALLOW, ()',
            f"{_HOLDS}[clone-user-namespace]",
        ),
        (
            "a terminal takes injected input",
            "_TERMINAL_IOCTLS = (0x5412, ",
            "_TERMINAL_IOCTLS = (",
            f"{_HOLDS}[terminal-input]",
        ),
        (
            "opens of programs are watched",
            "_USES = 0x1 | 0x10 | 0x20",
            "_USES = 0x1 | 0x10",
            f"{_HOLDS}[watch-programs]",
        ),
        (
            "memory of a strict cage becomes executable",
            "yield from _either(call, AnyBit(2, _PROT_EXEC), DENY, ALLOW)",
            "yield call, ALLOW, ()",
            "cage/test_programs.py::test_strict_refuses escape/test_sentences.py::test_a_sentence_is_true_of_its_cage",
        ),
    ),
    *_mutations(
        "isolator/layers/network/ruleset.py",
        (
            "the broker's listener takes direct connections",
            '"ct status dnat accept"',
            'f"tcp dport {PORT} accept"',
            f"{_HOLDS}[broker-port] layers/test_network.py",
        ),
        (
            "open connections are not counted",
            'f"ct count over {policy.connects_open} goto over_open"',
            'f"ct count over {policy.connects_open + 1000} goto over_open"',
            "layers/test_network.py::test_open_connections_are_limited",
        ),
    ),
    *_mutations(
        "isolator/launcher/init.py",
        (
            "pid 1 of a cage can be traced",
            "libc.prctl(ctypes.c_int(_PR_SET_DUMPABLE), ctypes.c_ulong(0))",
            "libc.prctl(ctypes.c_int(_PR_SET_DUMPABLE), ctypes.c_ulong(1))",
            f"{_CAGE}test_pid_1_is_root_s_to_look_into_and_holds_nothing_of_the_launcher",
        ),
        (
            "pid 1 outlives the supervisor",
            "libc.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), ctypes.c_ulong(signal.SIGKILL))",
            "pass",
            "standalone/test_run.py::test_nothing_survives_when_the_launcher_is_killed_too",
        ),
        (
            "a cage runs although it was not confirmed",
            'if report.recv(1) != b"x":',
            'if report.recv(1) == b"y":',
            "launcher/test_enter.py::test_cage_that_is_given_up_runs_nothing",
        ),
    ),
    *_mutations(
        "isolator/launcher/enter.py",
        (
            "inherited descriptors stay open",
            "close_all_but(kept)",
            "pass",
            f"{_CAGE}test_pid_1_is_root_s_to_look_into_and_holds_nothing_of_the_launcher",
        ),
    ),
    *_mutations(
        "isolator/broker/resolver.py",
        (
            "a datagram with any id or question is an answer",
            "while not wire.answers(answer := await self._loop.sock_recv(sock, 4096), asked):",
            "while not (answer := await self._loop.sock_recv(sock, 4096)):",
            "broker/test_dns.py",
        ),
        (
            "an answer over TCP may be to another question",
            "if not wire.answers(answer, asked):",
            "if False:",
            "broker/test_dns.py",
        ),
    ),
    *_mutations(
        "isolator/broker/virtual.py",
        (
            "a virtual address is recycled while a flow uses it",
            "if not entry.flows and not entry.fixed:",
            "if not entry.fixed:",
            "policy/test_destinations.py",
        ),
        (
            "a virtual address is recycled soon after its answer",
            "if entry.answered > oldest:",
            "if False:",
            "policy/test_destinations.py",
        ),
    ),
    *_mutations(
        "isolator/linux/routes.py",
        (
            "gateways of routes with several hops are not known",
            "yield from _hops(value[offset + _NEXT_HOP : offset + length])",
            "pass",
            "linux/test_routes.py::test_gateway_of_each_form_is_found_and_nothing_else",
        ),
    ),
    *_mutations(
        "isolator/linux/unprivileged.py",
        (
            "nobody looks whether a service has lost its privileges",
            "if found != wanted or left or uid == 0:",
            "if False:",
            "supervisor/test_zygote.py::test_privilege_that_stays_is_noticed",
        ),
        (
            "a service keeps its bounding set",
            "    drop_bounding_set(last_capability())\n    os.setgroups",
            "    os.setgroups",
            "supervisor/test_zygote.py::test_forked_service_is_what_an_executed_one_is",
        ),
    ),
    *_mutations(
        "isolator/linux/sibling.py",
        (
            "forked services draw the same random numbers",
            "        interpreter.PyOS_AfterFork_Child()\n",
            "",
            "supervisor/test_zygote.py::test_forked_service_is_what_an_executed_one_is",
        ),
    ),
    *_mutations(
        "isolator/broker/host_addresses.py",
        (
            "gateways are never read again",
            "        self._stale.set()\n\n",
            "        pass\n\n",
            "broker/test_guarantees.py::test_new_gateway_of_the_host_is_out_of_reach",
        ),
        (
            "the host's addresses are those of its start",
            "item in self._own or self._routes.is_own(str(item))",
            "item in self._own",
            "broker/test_guarantees.py::test_new_address_of_the_host_is_out_of_reach_before_any_notice_is_read",
        ),
        (
            "an address that has become the host's is believed to be nobody's",
            " or self._notices.poll(0)",
            "",
            "broker/test_guarantees.py::test_address_is_asked_for_again_after_any_change_that_makes_it_the_hosts",
        ),
    ),
    *_mutations(
        "isolator/broker/relay.py",
        (
            "bytes pass past the deadline of a plugin",
            "if self._fence.until is not None and self._fence.closed:",
            "if False:",
            "broker/test_fence.py::test_broker_relays_nothing_past_the_deadline_and_everything_when_it_is_moved",
        ),
        (
            "bytes that wait for a slow reader go out beside the cage's turns",
            "if self._turns.over:\n            self._loop.remove_writer(self._out)",
            "if False:\n            self._loop.remove_writer(self._out)",
            "broker/test_turns.py::test_bytes_that_wait_for_their_sinks_go_out_in_turns_too",
        ),
    ),
    *_mutations(
        "isolator/supervisor/fences.py",
        (
            "a cage goes on past the deadline of its plugin",
            "if fence.closed and name not in self._frozen:",
            "if False:",
            "system/test_fence.py::test_plugin_past_its_deadline_stands_still_and_goes_on_when_it_is_moved",
        ),
    ),
    *_mutations(
        "host/host_api/api.py",
        (
            "a call past the deadline of its plugin is answered",
            "        await fence.opened()\n        answer",
            "        answer",
            "host/test_fence.py::test_call_past_the_deadline_is_answered_once_that_is_moved",
        ),
    ),
    *_mutations(
        "isolator/broker/reach.py",
        (
            "addresses of the host itself can be reached",
            "return reason or self._shared.host.owner(address)",
            "return reason",
            "broker/test_ablation.py::test_address_of_the_host_as_written_is_stopped_by_one_check",
        ),
        (
            "a resolved address is dialled wherever it leads",
            "if reason is None)",
            "if True)",
            "broker/test_guarantees.py::test_a_name_that_changes_its_address_after_the_answer_is_refused",
        ),
    ),
    *_mutations(
        "isolator/broker/shared.py",
        (
            "connections go out that cannot be recorded",
            "return DenialRule.AUDIT_UNAVAILABLE if self.audit_first else None",
            "return None",
            "broker/test_hardening.py::test_new_connections_are_refused_while_the_trail_cannot_be_written",
        ),
    ),
    *_mutations(
        "isolator/broker/guard.py",
        (
            "one of two Host headers has to fit",
            "return None if set(hello.names) == {name} else",
            "return None if name in hello.names else",
            "broker/test_sniff.py::test_guard_objects_to_another_or_no_name",
        ),
        (
            "one of two TLS names has to fit",
            "if set(hello.names) != {name}:",
            "if name not in hello.names:",
            "broker/test_sniff.py::test_guard_objects_to_another_or_no_name",
        ),
        (
            "an encrypted hello passes",
            "return DenialRule.ENCRYPTED_HELLO if hello.encrypted and not (allow_no_sni or allow_ech) else None",
            "return None",
            "broker/test_sniff.py::test_guard_objects_to_another_or_no_name",
        ),
    ),
    *_mutations(
        "isolator/broker/gate/tls.py",
        (
            "the second hello is not held to the name",
            "        self._judge(hello)\n        self.done = True  # a server asks once",
            "        self.done = True  # a server asks once",
            "broker/test_gate.py",
        ),
    ),
    *_mutations(
        "isolator/broker/gate/http.py",
        (
            "a chunk may be longer than it says",
            'if line != b"\\r\\n":',
            "if False:",
            "broker/test_gate.py",
        ),
        (
            "any answer to an upgrade opens the connection",
            "self.done = status == 101 or ",
            "self.done = status > 0 or ",
            "broker/test_gate.py",
        ),
    ),
    *_mutations(
        "isolator/policy/addresses.py",
        (
            "NAT64 hides an address",
            "        if address in _NAT64:\n",
            "        if False:\n",
            "policy/test_destinations.py::test_every_ipv6_spelling_of_a_blocked_ipv4_address_is_blocked",
        ),
    ),
    *_mutations(
        "isolator/policy/destinations.py",
        (
            "a wildcard covers names that only end like it",
            "return text.endswith(self.suffix)",
            "return text.endswith(self.suffix[1:])",
            "policy/test_destinations.py::test_a_wildcard_stands_for_whole_labels",
        ),
    ),
    *_mutations(
        "isolator/policy/meet/effective.py",
        (
            "the ceiling of the host does not count",
            "bounds = meet_bounds(meet_bounds(ceiling_bounds(host), granted), request)",
            "bounds = meet_bounds(granted, request)",
            "policy/test_effective_always.py policy/test_effective.py",
        ),
        (
            "an update may ask for more folders",
            "if not any(names.path_covers(outer, path) for outer in known):",
            "if False:",
            "policy/test_effective.py",
        ),
    ),
    *_mutations(
        "isolator/policy/parse/trusted.py",
        (
            "a policy file that others can write is believed",
            "if status.st_mode & too_open:",
            "if False:",
            "policy/test_load.py::test_a_file_that_others_can_write_is_refused",
        ),
    ),
    *_mutations(
        "isolator/policy/request.py",
        (
            "a broken reader names a program outside the folder",
            'if first != "." or not rest or {"", ".", ".."} & set(rest):',
            'if first != "." or not rest:',
            "reader/test_reader.py",
        ),
    ),
    *_mutations(
        "isolator/reader/hardening.py",
        (
            "the reader keeps every system call",
            "    seccomp.load_filter(program, listener=False)\n",
            "    pass\n",
            "reader/test_reader.py::test_hardened_reader_can_do_none_of_what_an_unhardened_one_can",
        ),
    ),
    *_mutations(
        "isolator/broker/hardening.py",
        (
            "the broker starts programs",
            'yield "clone", syscalls.REFUSE, (Equal(0, _CLONE_THREAD, 0),)',
            'yield "clone", syscalls.ALLOW, (Equal(0, _CLONE_THREAD, 0),)',
            "broker/test_hardening.py",
        ),
    ),
    *_mutations(
        "isolator/audit/verify.py",
        (
            "a seal of a replaced key counts",
            "elif self._order.index(name) < self._key:",
            "elif False:",
            "audit/test_seals.py::test_seal_of_a_key_that_was_replaced_does_not_count",
        ),
        (
            "any source explains missing files",
            " and record.origin == AUDIT:",
            ":",
            "audit/test_verify.py::test_only_the_writer_explains_missing_files",
        ),
    ),
    *_mutations(
        "isolator/audit/record.py",
        (
            "a source writes records of another's type",
            "if not may_write(source, type_):",
            "if False:",
            "audit/test_service.py audit/test_schema.py",
        ),
    ),
    *_mutations(
        "isolator/audit/seal.py",
        (
            "a signing key that others can read is used",
            "if status.st_mode & 0o077:",
            "if False:",
            "audit/test_seals.py",
        ),
    ),
    *_mutations(
        "host/plugins/secrets.py",
        (
            "a new secret is not redacted",
            "            self._values[plugin] = {**current, **given}\n            self._redactors.pop(plugin, None)\n",
            "            self._values[plugin] = {**current, **given}\n",
            "host/test_secrets.py::test_redaction_follows_each_change_of_the_config",
        ),
        (
            "a secret of a version on trial is not redacted",
            "                versions[digest] = kept\n            self._redactors.pop(plugin, None)\n",
            "                versions[digest] = kept\n",
            "host/test_secrets.py::test_redaction_follows_each_change_of_the_config",
        ),
    ),
    *_mutations(
        "host/plugins/keyfile.py",
        (
            "a sealed value can be moved to another plugin",
            'return f"{plugin}\\0{key}".encode()',
            "return key.encode()",
            "host/test_secrets.py::test_values_are_encrypted_and_bound_to_their_place",
        ),
        (
            "a key file that others can read is used",
            " or status.st_mode & 0o077:",
            ":",
            "host/test_secrets.py::test_a_bad_key_file_is_refused_with_a_reason_and_never_replaced",
        ),
    ),
    *_mutations(
        "host/control/server.py",
        (
            "strangers take every place",
            "share = STRANGER_SHARE if caller.role is None else",
            "share = CONNECTIONS if caller.role is None else",
            "host/test_control.py::test_idle_connections_of_strangers_keep_nobody_out",
        ),
    ),
    *_mutations(
        "host/host_api/api.py",
        (
            "another user calls the host API as a plugin",
            "if plugin is None or plugin.uid != uid:",
            "if plugin is None:",
            "host/test_host_api.py::test_another_user_is_turned_away",
        ),
        (
            "a plugin that goes before its answer leaves no record of its call",
            "if self._released is None:",
            "if False:",
            "host/test_host_api.py::test_call_whose_plugin_does_not_wait_for_the_answer_is_on_record",
        ),
    ),
    *_mutations(
        "host/control/connection.py",
        (
            "a caller that goes before its answer breaks its change off",
            "if not request.changes:",
            "if True:",
            "host/test_callers_gone.py::test_change_goes_on_and_is_on_record_and_what_is_read_ends",
        ),
    ),
    *_mutations(
        "host/delivery/sidecar.py",
        (
            "an event goes to a socket of another user",
            "if plugin.uid is None or uid == plugin.uid:",
            "if True:",
            "host/test_bad_replies.py::test_a_socket_served_by_somebody_else_gets_nothing",
        ),
    ),
    *_mutations(
        "host/plugins/registry.py",
        (
            "an event outside the filter of a plugin is accepted for it",
            "if plugin.filtered and not plugin.sees(payload):",
            "if False:",
            "host/test_operations.py::test_plugin_gets_what_it_has_missed_as_far_as_its_hooks_and_filters_go",
        ),
        (
            "a plugin hears of itself",
            'if event_type.name.startswith(OPERATIONAL) and payload.get("plugin") == plugin.name:',
            "if False:",
            "host/test_operational.py::test_each_kind_goes_to_those_who_are_granted_it_and_never_to_whom_it_is_about",
        ),
    ),
    *_mutations(
        "host/delivery/worker.py",
        (
            "an event that waits is sent though the grant's filter leaves it out now",
            "elif plugin.filtered and not plugin.sees(json.loads(event.payload)):",
            "elif False:",
            "system/test_operations.py::test_plugin_sees_no_event_outside_the_filter_of_its_grant_by_any_road",
        ),
    ),
)  # fmt: skip
