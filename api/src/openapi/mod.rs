//! The API's description, as OpenAPI 3.1: made from the table of routes (`crate::routes`), where each route stands with its [`Operation`],
//! and from the types of [`crate::wire`]. What is not in that table is neither served nor described.
//!
//! | module | what |
//! | --- | --- |
//! | `operation` | what one route takes and answers |
//! | `document` | all of them as one document |

mod document;
mod operation;

pub(crate) use document::document;
pub(crate) use operation::{Operation, Tag};
