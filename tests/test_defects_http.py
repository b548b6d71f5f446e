"""The defects of the C platform that concern HTTP, files and WebSockets: one row each, and the test that finds it.

The rows are those of http.md 19.1 to 19.3 and of kore-api.md 19 and 20, in their order, with what must hold instead.
A row names tests as "file::function" (without "test_" and ".py"), each of which fails on a server that behaves as
the C platform does; "here::function" is one of this file. That each exists, and that no row is missing, is tested.
"""

from __future__ import annotations

import ast
import contextlib
import re
import socket
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.files_harness import write
from tests.http_server_harness import ENGINES, GET, Client, chunked, request, serving, since
from tests.support import pids_of, skip_unless, starter, wait_until
from tests.websocket_harness import WsClient, opening

TESTS = Path(__file__).parent


class Row(NamedTuple):
    """One defect."""

    row: str
    """Section and number, or for a list without numbers the place in it."""
    must: str
    tests: tuple[str, ...]


def row(number: str, must: str, *tests: str) -> Row:
    return Row(number, must, tests)


SMUGGLING = [
    row("1", "chunked is decoded within limits; with a length or in HTTP/1.0 it is 400, another coding 501",
        "http_parser::19_1_1_chunked_is_decoded_and_ambiguous_codings_are_refused",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection",
        "http_server_status::chunks_that_sum_up_to_too_much_are_refused"),
    row("2", "a length is digits; equal ones collapse, differing and malformed ones are 400",
        "http_parser::19_1_2_content_length_is_digits_and_only_one_value",
        "http_parser::repeated_equal_lengths_collapse"),
    row("3", "DELETE is framed like every method, and without a length has no body",
        "http_parser::19_1_3_delete_is_framed_like_every_method",
        "http_server_status::bodies_arrive_whole_whatever_the_method"),
    row("4", "bodies of GET, HEAD and OPTIONS are never the next request",
        "http_parser::19_1_4_bodies_of_get_head_and_options_are_consumed", "here::no_body_is_the_next_request"),
    row("5", "lines end with CRLF and nothing else", "http_parser::19_1_5_only_crlf_ends_a_line",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("6", "NUL is 400 wherever it stands", "http_parser::19_1_6_nul_is_refused_wherever_it_stands"),
    row("7", "100 fields count all, more are 431",
        "http_parser::19_1_7_a_length_after_many_fields_is_seen_and_too_many_are_431",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("8", "Host is one field of exactly that name, valid, and what the application sees",
        "http_parser::19_1_8_host_is_one_exact_valid_field",
        "http_server_handlers::what_a_request_says_of_itself", "http_head::malformed_hosts_are_refused"),
    row("9", "a request line has exactly two single spaces", "http_parser::19_1_9_exactly_two_single_spaces"),
    row("10", "a field without a name is 400", "http_parser::19_1_10_an_empty_name_is_refused"),
    row("11", "what follows a body is the next request, at any cut",
        "http_parser::19_1_11_what_follows_a_body_is_the_next_request",
        "http_combinations::who_is_let_in_and_who_is_not_in_one_pipeline"),
    row("12", "a pipeline is answered in order, also behind handlers that wait",
        "http_parser::19_1_12_pipelined_requests_come_out_in_order",
        "http_server_pipeline::a_thousand_mixed_requests_are_answered_in_order",
        "here::a_request_sent_while_a_handler_waits_is_answered"),
    row("13", "the body of a request that was answered early is dropped, or the connection is closed",
        "http_redirects::the_body_of_a_redirected_request_is_not_the_next_request",
        "http_server_status::a_body_for_a_path_nobody_serves_is_not_waited_for",
        "http_auth::a_short_body_of_who_is_not_let_in_is_dropped",
        "http_combinations::a_redirect_with_a_chunked_body_and_a_request_inside"),
    row("14", "a request has one response, a second one raises",
        "http_server_handlers::a_sync_handler_that_fails_gives_one_response",
        "http_server_handlers::an_async_handler_that_fails_gives_one_response",
        "http_hooks::on_headers_can_end_the_request", "http_hooks::on_body_chunk_ends_the_request_with_one_answer",
        "http_async_bodies::a_body_that_answers_its_own_request_gives_one_response"),
    row("15", "bodies are framed by RFC 9112 6, none with HEAD, 1xx, 204 and 304; a page only without a body",
        "http_server_limits::pretty_errors_are_pages_and_only_for_errors_without_a_body",
        "http_server_status::statuses_are_framed_as_http_has_them",
        "http_server_handlers::bodies_of_every_kind", "http_server_handlers::http_1_0_gets_no_chunks",
        "http_async_bodies::http_1_0_has_it_up_to_the_end_of_the_connection",
        "http_combinations::interim_responses_have_no_framing_fields"),
    row("16", "fields of the application cannot break the head, and the core's are single",
        "http_server_handlers::fields_that_would_break_the_head_are_refused",
        "http_server_handlers::fields_of_the_application",
        "http_redirects::what_the_client_wrote_cannot_break_the_head"),
]

GAPS = [
    row("date", "every response has a date", "http_server_handlers::the_order_of_a_head"),
    row("allow", "405 says what is allowed",
        "http_server_status::a_method_no_route_has_is_405_and_says_which_are_allowed",
        "http_routes::405_lists_what_all_routes_of_the_path_allow"),
    row("connection", "its tokens are read as a list", "http_server_status::a_client_that_says_close_gets_it"),
    row("1.0", "keep-alive of HTTP/1.0", "http_server_status::http_1_0_is_kept_alive_when_it_asks"),
    row("empty lines", "CRLF before a request is passed over",
        "http_server_status::empty_lines_before_a_request_are_passed_over"),
    row("targets", "absolute form and *", "http_server_status::absolute_form_wins_over_host",
        "http_server_status::options_of_the_server_says_what_is_allowed"),
    row("methods", "compared with their case, unknown ones are 501",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("values", "empty ones, TAB and bytes from 0x80 are legal, white space around is not the value's",
        "http_head::fields_are_trimmed_folded_and_decoded", "http_server_handlers::what_a_request_says_of_itself"),
    row("expect", "100 (Continue), 417 for what is unknown",
        "http_server_status::a_client_that_waits_for_leave_gets_it_once",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("431", "for heads that are too large",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("conditions", "304 without a length, dates compared, tags, three forms of dates, If-Unmodified-Since",
        "http_files::not_modified", "http_conditional::preconditions", "http_conditional::a_date"),
    row("ranges", "Range and If-Range", "http_files::one_range", "http_files::several_ranges", "http_files::if_range",
        "http_combinations::ranges_of_a_compressed_file"),
    row("408", "an idle connection is closed without a word",
        "http_server_deadlines::what_takes_too_long_is_ended_in_time"),
    row("page", "has a content-type with its charset; none to HEAD, also from the parser",
        "http_server_limits::pretty_errors_are_pages_and_only_for_errors_without_a_body",
        "http_combinations::the_refusal_behind_a_head_request_is_whole"),
    row("cookies", "whole values, empty ones, names with their case, more than nine; set-cookie more than once",
        "http_cookies::one_field", "http_cookies::as_many_as_a_browser_keeps_and_of_more_none",
        "http_server_handlers::fields_of_the_application"),
    row("half-close", "a client that sent its FIN gets its answer",
        "http_server_clients::a_client_that_only_sent_its_fin_gets_its_response",
        "http_combinations::a_fin_while_the_gate_is_asked"),
    row("lingering", "a refusal is not destroyed by an RST",
        "http_server_status::the_status_is_read_by_a_client_that_goes_on_sending"),
]

ROBUSTNESS = [
    row("1", "a redirect without a route is logged, and no lock is shared with others",
        "here::a_redirect_without_a_route_is_logged_by_every_worker"),
    row("2", "what is logged is a copy", "here::a_redirect_without_a_route_is_logged_by_every_worker",
        "http_accesslog::no_client_can_forge_a_line"),
    row("3", "no sibling directory whose name begins alike", "http_files_hostile::nothing_leads_out"),
    row("4", "aliases leak nothing, the cache is bounded, truncation ends the response, only regular files",
        "http_files_hostile::aliases_leak_no_fds", "http_files_hostile::the_cache_is_bounded",
        "http_files_sending::a_file_that_is_truncated", "http_files_hostile::what_is_no_file"),
    row("5", "empty files are 200; links have one policy", "http_files::an_empty_file",
        "http_files_hostile::links_that_lead_out", "http_files_hostile::links_that_stay_inside"),
    row("6", "decoded once, + is a plus, the URL of a map is no pattern", "http_files::found",
        "here::the_url_of_a_map_is_no_pattern"),
    row("7", "no input and no callback ends a worker: 1007, 1011, or a dropped argument",
        "websocket_server::what_is_forbidden", "websocket_server::invalid_text_closes_at_once",
        "websocket_server::an_exception_of_a_callback_closes_with_1011",
        "http_request_carries::no_value_and_no_rule_ends_the_worker"),
    row("8", "deadlines hold on an idle worker, while output waits, and as announced",
        "http_server_deadlines::what_takes_too_long_is_ended_in_time",
        "http_server_deadlines::a_client_that_takes_nothing_of_its_response_is_reset",
        "http_bodies::a_body_that_makes_progress_has_time_and_one_that_does_not_has_none"),
    row("9", "each deadline has its own clock", "http_server_deadlines::what_takes_too_long_is_ended_in_time"),
    row("10", "authenticated before the body, which has no memory before it comes and a file when it is large",
        "http_auth::who_is_not_let_in_uploads_nothing", "http_bodies::gigabytes_pass_in_constant_memory",
        "http_disk::the_client_is_not_read_and_the_others_are_served",
        "here::an_announced_length_reserves_nothing"),
    row("11", "the digest is the body's, and the body the request's, also after the answer",
        "http_request_carries::the_body_survives_everything",
        "http_server_handlers::bodies_are_read_as_the_reference_has_it"),
    row("12", "populate_post leaves the body, looks at its type, and serves every method",
        "http_parameters::populating_leaves_the_body_as_it_is",
        "http_parameters::the_content_type_of_a_form_is_looked_at",
        "http_parameters::forms_of_every_method_with_a_body"),
    row("13", "the cookie of authentication has exactly that name", "http_auth::the_name_of_a_cookie_is_exact"),
    row("14", "multipart by RFC 7578", "http_multipart::boundaries", "http_multipart::names",
        "http_multipart::contents_that_look_like_delimiters", "http_multipart::the_fifth_line_of_a_part_is_read_too",
        "http_multipart::what_is_no_form_data_or_has_no_name_is_left_out_with_its_content",
        "http_combinations::a_form_on_disk_with_its_delimiter_at_the_end_of_a_piece"),
    row("15", "async rules and hooks are awaited, and hooks can end the request",
        "http_request_carries::rules_that_wait_are_awaited", "http_hooks::on_headers_comes_first_and_then_the_rest",
        "http_hooks::on_headers_can_end_the_request"),
    row("16", "the directory of bodies is the worker's own, and swept",
        "http_bodies::the_directory_is_the_workers_own",
        "http_bodies::what_dead_workers_left_is_swept_at_the_start_and_nothing_else",
        "http_bodies::a_killed_workers_files_are_swept_by_the_next"),
    row("17", "idle at the limit of connections and without descriptors",
        "http_server_limits::no_more_connections_than_allowed_and_those_that_wait_are_served",
        "http_server_limits::when_descriptors_run_out_clients_wait_and_the_worker_is_idle"),
    row("18", "no worker keeps the others from accepting; one that accepts nothing is none to crash",
        "here::a_worker_that_is_stuck_leaves_the_others_the_listener",
        "process_serve::a_worker_that_does_not_accept_runs_its_tasks"),
    row("19", "a broadcast comes once, never to its source, also after restarts",
        "process_broadcast::a_global_broadcast_reaches_every_client_once_and_never_its_source",
        "process_broadcast::after_restarts_a_broadcast_still_comes_once"),
    row("20", "RFC 6455 whole; the origin is the handler's to judge, before the handshake",
        "websocket_server::what_is_no_handshake_gets_400_and_no_callback", "websocket_server::http_1_0_is_refused",
        "websocket_server::what_is_allowed", "websocket_server::what_is_forbidden",
        "websocket_server::frames_that_came_with_the_handshake_are_not_lost",
        "websocket_server::a_clients_close_is_answered_with_its_code",
        "websocket_server::silent_clients_are_asked_and_then_dropped",
        "here::a_handler_may_refuse_an_origin"),
    row("21", "the port is cut off whatever the family of the socket", "http_head::hosts",
        "here::a_name_with_a_port_is_found_over_ipv6"),
    row("22", "exact names before the longest pattern before *, in any order of declaration",
        "http_routes::an_exact_name_comes_before_the_longest_pattern_before_the_catch_all",
        "application::only_identical_names_are_refused"),
    row("23", "$qs is empty without a query, the longest number is meant, a location is a URI",
        "http_redirects::the_query_string_is_put_in_and_is_empty_without_one",
        "http_redirects::groups_are_put_in_and_the_longest_number_is_meant",
        "http_redirects::a_location_is_made_of_characters_of_a_uri_whatever_is_put_in"),
    row("24", "values are checked, unknown options are errors, and the least ones stall nothing",
        "settings::integers_hold_their_bounds_as_int_and_as_text",
        "settings::an_unknown_name_is_an_error_that_names_the_closest", "here::the_least_values_stall_nothing"),
    row("25", "an application's media types win, text has a charset", "http_files::media_types",
        "http_files::the_table_of_types"),
    row("26", "every response is logged, soon, escaped and by its method's name; logs are opened again",
        "http_accesslog::every_response_has_its_line", "http_accesslog::a_line_does_not_wait_for_others",
        "http_accesslog::what_is_refused_early_has_its_line_too",
        "http_accesslog::no_client_can_forge_a_line", "http_combinations::control_bytes_never_reach_the_log",
        "http_combinations::refusals_behind_a_request_are_not_about_that_request",
        "process_reopen::after_a_hangup_every_worker_writes_to_the_new_files"),
    row("27", "a stop lets requests end", "process_serve::requests_that_run_are_finished_and_new_connections_refused",
        "http_server_limits::a_request_on_its_way_is_answered_at_the_end"),
    row("28", "what a client says of its address is not believed", "here::forwarded_addresses_are_not_believed"),
]

CRASHES = [  # those of kore-api.md 19 that are about tasks, locks, sockets, children, timers and clients are not here
    row("1", "what a handler returns is ignored", "http_server_handlers::results_of_handlers_do_not_matter",
        "http_hooks::on_headers_comes_first_and_then_the_rest"),
    row("2", "an exception in onmsg, and text that is no UTF-8, end the connection alone",
        "websocket_server::an_exception_of_a_callback_closes_with_1011", "websocket_server::what_is_forbidden"),
    row("3", "an exception in onconnect and ondisconnect, and names for callbacks",
        "websocket_server::an_exception_of_a_callback_closes_with_1011",
        "websocket_server::an_exception_of_ondisconnect_is_logged", "websocket_server::names_are_resolved"),
    row("4", "a rule that raises, or a value that is no UTF-8, drops the value",
        "http_request_carries::no_value_and_no_rule_ends_the_worker",
        "http_parameters::an_exception_in_a_rule_drops_the_value"),
    row("6", "a bad option is an exception", "settings::whatever_is_assigned_is_taken_or_refused_with_a_message"),
    row("7", "SIGHUP opens logs again and ends nothing",
        "process_reopen::after_a_hangup_every_worker_writes_to_the_new_files"),
    row("8", "a redirect in a domain with a log", "here::a_redirect_without_a_route_is_logged_by_every_worker"),
    row("9", "an empty iterable is an empty body, a bad first item a 500, a later one no whole body",
        "http_server_handlers::bodies_of_every_kind",
        "http_server_handlers::a_body_that_fails_before_its_first_byte_is_a_500",
        "http_server_handlers::a_body_that_fails_later_is_seen_not_to_be_whole",
        "http_async_bodies::what_fails_later_ends_the_connection_without_the_last_chunk"),
    row("10", "the body after the answer", "http_server_handlers::bodies_are_read_as_the_reference_has_it",
        "http_request_carries::the_body_survives_everything"),
    row("11", "the body after populate_post", "http_request_carries::the_body_survives_everything"),
    row("12", "no page before a body of the application's own",
        "http_server_limits::pretty_errors_are_pages_and_only_for_errors_without_a_body"),
    row("13", "one response", "http_server_handlers::a_sync_handler_that_fails_gives_one_response",
        "http_server_handlers::an_async_handler_that_fails_gives_one_response"),
    row("14", "a global broadcast comes once",
        "process_broadcast::a_global_broadcast_reaches_every_client_once_and_never_its_source"),
    row("21", "rules and on_headers that wait are awaited", "http_request_carries::rules_that_wait_are_awaited",
        "http_hooks::on_headers_comes_first_and_then_the_rest"),
    row("22", "an async prerequest that raises stops the request",
        "http_prerequests::one_that_raises_ends_the_request_with_one_answer"),
    row("23", "a request and a connection used after their end",
        "http_request_carries::a_request_used_after_its_end", "http_server_handlers::a_request_kept_beyond_its_end",
        "websocket_server::an_end_without_a_close_is_told_once"),
    row("25", "bad calls are errors and no crashes", "application::a_bad_filemap_is_a_runtime_error_and_adds_nothing",
        "application::privsep_adds_up_and_without_keywords_does_nothing",
        "process_messages::sendobj_while_the_application_is_loaded_is_an_error_and_no_crash",
        "settings::deleting_is_an_attribute_error"),
    row("26", "agent is the user agent", "http_request_carries::the_agent_is_the_agent_and_getters_are_read_only"),
    row("28", "no onconnect after a handshake that failed",
        "websocket_server::what_is_no_handshake_gets_400_and_no_callback"),
    row("29", "a named domain is found on all servers",
        "application_routes::the_decorator_finds_a_named_domain_on_every_server"),
    row("30", "built-in media types are overridden", "http_files::media_types"),
]

BOTH_SIDES = [  # kore-api.md 20, as far as it is about HTTP: what the page and the source say differently, both work
    row("9", "a head that is too large is answered, then closed",
        "http_server_status::what_cannot_be_trusted_gets_a_status_and_a_closed_connection"),
    row("10", "auth=None is none", "here::none_is_what_is_not_given"),
    row("11", "key, which the page lists for routes, is taken and means nothing",
        "application_routes::the_key_that_the_reference_lists_for_routes_means_nothing"),
    row("12", "qs, hooks, and file maps as tuples",
        "application_routes::parameters_auth_and_hooks_are_kept_with_the_route",
        "application::filemaps_are_checked_and_kept"),
    row("13", "kore.route, kore.prerequest and applications of a module",
        "application::an_application_without_a_class",
        "application_routes::the_decorator_returns_the_handler_and_may_come_before_the_domain"),
    row("29", "agent", "http_request_carries::the_agent_is_the_agent_and_getters_are_read_only"),
    row("30", "body is bytes", "http_server_handlers::bodies_are_read_as_the_reference_has_it"),
    row("31", "populate_multipart and populate_multi", "here::both_names_of_populate_multi"),
    row("32", "a response is anything like bytes, text, None, or an iterable",
        "http_server_handlers::bodies_of_every_kind"),
    row("33", "protocol, body_digest, headers(), attributes", "http_server_handlers::what_a_request_says_of_itself",
        "http_request_carries::the_body_survives_everything"),
    row("34", "name and filename of a file", "http_multipart::files_are_found_by_the_name_of_their_field"),
    row("35", "names and callables", "websocket_server::names_are_resolved"),
    row("36", "a broadcast of text and of bytes", "process_calls::a_local_broadcast_stays_in_the_worker"),
    row("37", "the members of a connection", "http_server_handlers::the_connection_is_one_stable_object",
        "websocket_server::echo_of_every_size"),
    row("39", "what they return is True", "here::both_names_of_populate_multi",
        "process_calls::a_local_broadcast_stays_in_the_worker"),
    row("45", "the constants of WebSockets", "public_names::the_constants_have_their_values"),
]

SECTIONS = {
    "http.md 19.1": SMUGGLING, "http.md 19.2": GAPS, "http.md 19.3": ROBUSTNESS, "kore-api.md 19": CRASHES,
    "kore-api.md 20": BOTH_SIDES,
}


@cache
def functions_of(file: str) -> frozenset[str]:
    """The test functions of a file that pytest would run."""
    path = Path(__file__) if file == "here" else TESTS / f"test_{file}.py"
    found = ast.parse(path.read_text()).body
    return frozenset(one.name.removeprefix("test_") for one in found
                     if isinstance(one, ast.FunctionDef) and one.name.startswith("test_"))


@pytest.mark.parametrize(("section", "one"), [
    pytest.param(section, one, id=f"{section} {one.row}") for section, rows in SECTIONS.items() for one in rows
])
def test_each_defect_has_its_test(section, one):
    assert one.must
    assert one.tests, f"{section} row {one.row} has none"
    for reference in one.tests:
        file, _, function = reference.partition("::")
        assert function in functions_of(file), f"{section} row {one.row}: there is no {reference}"


def test_no_row_is_missing_and_no_test_of_this_file_idle():
    assert [one.row for one in SMUGGLING] == [str(number) for number in range(1, 17)]
    assert [one.row for one in ROBUSTNESS] == [str(number) for number in range(1, 29)]
    assert len({one.row for one in GAPS}) == len(GAPS) == 17
    named = {reference for rows in SECTIONS.values() for one in rows for reference in one.tests}
    ours = {f"here::{name}" for name in functions_of("here")}
    assert ours - named == {
        "here::each_defect_has_its_test", "here::no_row_is_missing_and_no_test_of_this_file_idle",
        "here::the_worker_is_the_one_it_was",
    }


# --- what no other file tests ----------------------------------------------------------------------------------

APP = """
import asyncio
import time

home.accesslog = "home.log"

@kore.route("/length", domain=home)
def length(req):
    req.response(200, str(len(req.body)).encode())

@kore.route("/wait", domain=home)
async def wait(req):
    kore.log(kore.LOG_INFO, f"waits {req.query}")
    await asyncio.sleep(0.1)
    req.response(200, b"waited")

@kore.route("/stuck", domain=home)
def stuck(req):
    kore.log(kore.LOG_INFO, "stuck")
    time.sleep(3)
    req.response(200, b"late")

home.redirect("^/gone/(.*)$", 301, "/$1?$qs")
home.filemaps({"/a.c+/": "www"})

@kore.route("/ws", domain=home)
def ws(req):
    if req.request_header("origin") not in (None, "https://good.example"):
        req.response(403, None)
    else:
        req.websocket_handshake(None, None, None)

home.route("/none", index, methods=["get"], auth=None, hooks=None, get=None, qs=None)

@kore.route("/form", domain=home, post={"a": "."})
def form(req):
    found = [req.populate_multipart(), req.populate_multi(), req.populate_post(), req.populate_get(),
             req.populate_cookies(), req.response_header("x", "y"), req.argument("a")]
    found.append(req.response(200, repr(found).encode()))
    assert found[-1] is True
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("defects")
    write(base / "www" / "a.txt", b"a file")
    with serving(base, request.param, APP, "kore.config.http_body_max = 1 << 30") as made:
        yield made


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE", "POST"])
@pytest.mark.parametrize("cut", [False, True])
def test_no_body_is_the_next_request(server, method, cut):
    """http.md 19.1 row 4: the C platform answered what was inside."""
    inside = request("/nowhere")
    for data in (request("/length", method=method, body=inside), chunked("/length", inside, method=method)):
        with server.client() as client:
            if cut:
                client.send(data[: -len(inside)])
                client.send(data[-len(inside) :])
            else:
                client.send(data)
            found = client.read(method)
            assert (found.status, found.fields["content-length"]) == (200, str(len(str(len(inside)))))
            client.alive()


def test_a_request_sent_while_a_handler_waits_is_answered(server):
    """http.md 19.1 row 12: it was left unread for ever."""
    with server.client() as client:
        client.send(request(f"/wait?{server.pid}"))
        server.program.wait_for(f"waits {server.pid}")
        client.send(GET + request("/length", method="POST", body=b"abc"))
        assert [client.read().body for _ in range(3)] == [b"waited", b"hello", b"3"]
        for _ in range(2):  # now that the heads are known, which is another way through the server
            client.send(GET + GET + request("/length", method="POST", body=b"abc") + GET)
            assert [client.read().body for _ in range(4)] == [b"hello", b"hello", b"3", b"hello"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_redirect_without_a_route_is_logged_by_every_worker(tmp_path, engine):
    """http.md 19.3 row 1: the worker died with a lock held, and the next one and the parent spun for ever."""
    skip_unless(engine)
    (tmp_path / "www").mkdir()
    with starter(tmp_path) as programs:
        program = programs.serve(APP, workers=2, io=engine)
        pids = pids_of(program)
        data = request("/gone/there?a=b", "Referer: https://x.example/" + "r" * 500, "User-Agent: " + "u" * 500)
        for _ in range(20):
            with Client(program.address) as client:
                for start in range(0, len(data), 100):
                    client.send(data[start : start + 100])
                found = client.read()
                assert (found.status, found.fields["location"]) == (301, "/there?a=b")
                for method in ("POST", "DELETE"):
                    assert client.ask(request("/gone/x", method=method, body=GET)).status == 301
                assert client.ask(GET).body == b"hello"
        log = tmp_path / "home.log"
        wait_until(lambda: log.read_bytes().count(b"\n") == 80, "80 lines of the access log")
        line = f'"GET /gone/there HTTP/1.1" 301 0 "https://x.example/{"r" * 500}" "{"u" * 500}"'
        assert log.read_text().count(line) == 20
        assert pids_of(program) == pids


def test_the_url_of_a_map_is_no_pattern(server):
    with server.client() as client:
        assert client.ask(request("/a.c+/a.txt")).body == b"a file"
        for path in ("/abc/a.txt", "/a.cc/a.txt", "/a.c/a.txt", "/xa.c+/a.txt", "/a.c /a.txt".replace(" ", "%20")):
            assert client.ask(request(path)).status == 404


def test_an_announced_length_reserves_nothing(server):
    """http.md 19.3 row 10: the C platform reserved all of it at once."""
    before = server.rss_kib()
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(server.client())
            client.send(request("/length", f"Content-Length: {1 << 30}", "Expect: 100-continue", method="POST"))
            assert client.read().status == 100
            client.send(b"some")
        assert server.rss_kib() - before < 8000
    server.unharmed()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_worker_that_is_stuck_leaves_the_others_the_listener(tmp_path, engine):
    """http.md 19.3 row 18. A ring has a few accepts in flight, so a stuck worker may hold as many clients, no more."""
    skip_unless(engine)
    (tmp_path / "www").mkdir()
    with starter(tmp_path) as programs:
        program = programs.serve(APP, workers=2, io=engine)
        pids_of(program)
        with contextlib.ExitStack() as stack:
            stack.enter_context(Client(program.address)).send(request("/stuck"))
            program.wait_for("stuck")
            begin = time.monotonic()
            clients = [stack.enter_context(Client(program.address)).send(GET) for _ in range(40)]
            late = 0
            for client in clients:
                client.sock.settimeout(0.3)
                try:
                    assert client.read().body == b"hello"
                except TimeoutError:
                    late += 1
            assert late <= 4, "as many as a ring has in flight"
            assert since(begin) < 3, "the others were not waited for"


def test_a_handler_may_refuse_an_origin(server):
    """RFC 6455 10.2: which origins are good only the application knows; the handshake is a call of its own."""
    for origin, status in (("https://good.example", 101), ("https://evil.example", 403), ("null", 403)):
        with WsClient(server.address, open_it=False) as client:
            assert client.send(opening("/ws", f"Origin: {origin}")).head() == status


@pytest.mark.parametrize("engine", ENGINES)
def test_a_name_with_a_port_is_found_over_ipv6(tmp_path, engine):
    """http.md 19.3 row 21: a listener of IPv6 took the port for part of the name."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
            port = sock.getsockname()[1]
    except OSError as error:
        pytest.skip(f"IPv6: {error.strerror}")
    text = f"""
kore.server("six", ip="::1", port={port}, tls=False)
six = kore.domain("www.example", attach="six")
six.route("/", index, methods=["get"])
address = kore.domain("::1", attach="six")
address.route("/", index, methods=["get"])
"""
    with serving(tmp_path, engine, text) as server:
        for host in (f"www.example:{port}", "www.example", "WWW.EXAMPLE.", f"[::1]:{port}", "[::1]", "[0:0::1]:80"):
            with socket.create_connection(("::1", port), timeout=10) as sock:
                sock.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                assert sock.makefile("rb").read().endswith(b"hello"), host
        server.unharmed()


@pytest.mark.parametrize(("options", "wanted"), [
    ("http_header_max = 1", {GET: 414, b"G": 414}),
    ("http_header_max = 40", {GET: 200, request("/" + "a" * 50): 414, request("/", "A: " + "b" * 30): 431}),
    ("http_body_max = 0", {GET: 200, request("/", method="POST"): 405, request("/", method="POST", body=b"x"): 413}),
    ("http_request_ms = 0", {GET: 200}),
    ("http_request_limit = 0", {GET: 200}),
    ("http_keepalive_time = 0", {GET: 200}),
    ("worker_max_connections = 1", {GET: 200, request("/nowhere"): 404}),
    ("worker_accept_threshold = 1", {GET: 200}),
    ("socket_backlog = 0", {GET: 200}),
    ("websocket_maxframe = 0", {GET: 200}),
])
def test_the_least_values_stall_nothing(tmp_path, options, wanted):
    """http.md 19.3 row 24: some of them hung the C platform."""
    with serving(tmp_path, "epoll", options=f"kore.config.{options}") as server:
        for data, status in wanted.items():
            assert server.ask(data).status == status, data


def test_forwarded_addresses_are_not_believed(server):
    """http.md 19.3 row 28: nobody has said which proxy may be trusted."""
    fields = [f"{name}: 10.9.8.7" for name in ("X-Forwarded-For", "X-Real-IP", "Client-IP")]
    assert server.ask(request("/length?forwarded", *fields, "Forwarded: for=10.9.8.7", "User-Agent: fwd")).status == 200
    with server.client() as client:
        assert client.ask(b"PROXY TCP4 10.9.8.7 10.9.8.7 1 2\r\n" + GET).status in (400, 501)
    log = Path(server.program.directory, "home.log")
    wait_until(lambda: '"fwd"' in log.read_text(), "the line")
    assert re.search(r'^127\.0\.0\.1 .*"fwd"$', log.read_text(), re.MULTILINE)
    assert "10.9.8.7" not in log.read_text()


def test_none_is_what_is_not_given(server):
    """kore-api.md 20 row 10."""
    assert server.ask(request("/none")).body == b"hello"


def test_both_names_of_populate_multi(server):
    """kore-api.md 20 rows 31 and 39."""
    body = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--B--\r\n'
    found = server.ask(request("/form", "Content-Type: multipart/form-data; boundary=B", method="POST", body=body))
    assert found.body.decode() == repr([True] * 6 + ["1"])


def test_the_worker_is_the_one_it_was(server):
    server.unharmed()
