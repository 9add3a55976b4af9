//! The page at `/`: one file, which asks the server that it came from and nobody else.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodFilter;

use crate::app::App;
use crate::call::{Call, Door};
use crate::failure::{Failure, Form};

const PAGE: Door = Door::open("page", Form::Plain);

/// Adds the route.
pub fn routes(router: Router<Arc<App>>) -> Router<Arc<App>> {
    PAGE.route(router, MethodFilter::GET, "/", page)
}

async fn page(_: Call) -> Result<Response, Failure> {
    let rules = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; \
                 frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(rules)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (HeaderName::from_static("referrer-policy"), HeaderValue::from_static("no-referrer")),
    ];
    Ok((headers, include_str!("page.html")).into_response())
}
